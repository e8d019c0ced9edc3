"""What dev/compare_maskrcnn.py and dev/ablation_v2.py share, and the Mask R-CNN that the first trains."""
