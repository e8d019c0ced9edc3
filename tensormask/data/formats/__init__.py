"""Data sets in other formats than COCO's, and their conversion."""
