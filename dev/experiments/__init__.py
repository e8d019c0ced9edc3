"""What dev/compare_maskrcnn.py and dev/ablation_v2.py share, and the former's Mask R-CNN."""
