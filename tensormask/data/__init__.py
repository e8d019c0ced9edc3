"""Data sets, transforms and loaders."""

from .catalog import get_dataset, register_coco_instances
from .coco import CocoDataset
from .loader import build_test_loader, build_train_loader, check_num_classes

__all__ = [
    "CocoDataset",
    "build_test_loader",
    "build_train_loader",
    "check_num_classes",
    "get_dataset",
    "register_coco_instances",
]
