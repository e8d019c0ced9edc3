"""Evaluate models by COCO's metrics, and write results, tables and images."""

from tensormask.evaluation.coco import evaluate
from tensormask.evaluation.oracle import evaluate_oracle, oracle_detections
from tensormask.evaluation.report import UnexpectedResultsError, results_table, verify_results
from tensormask.evaluation.results import coco_results
from tensormask.evaluation.scoring import evaluate_results

__all__ = [
    "UnexpectedResultsError",
    "coco_results",
    "evaluate",
    "evaluate_oracle",
    "evaluate_results",
    "oracle_detections",
    "results_table",
    "verify_results",
]
