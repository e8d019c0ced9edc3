"""Data sets, their checks, transforms and loaders."""

from tensormask.data.catalog import get_dataset, register_coco_instances
from tensormask.data.checks.issues import IssueReporter
from tensormask.data.coco import CocoDataset
from tensormask.data.loader import build_test_loader, build_train_loader, check_dataset

__all__ = [
    "CocoDataset",
    "IssueReporter",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "get_dataset",
    "register_coco_instances",
]
