"""Data sets, transforms and loaders."""

from .catalog import get_dataset, register_coco_instances
from .coco import CocoDataset
from .faults import FaultReporter
from .loader import build_test_loader, build_train_loader, check_dataset

__all__ = [
    "CocoDataset",
    "FaultReporter",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "get_dataset",
    "register_coco_instances",
]
