"""The best and the worst images of evaluations: predictions beside the ground truth, small."""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tensormask.data import get_dataset
from tensormask.evaluation.predictions import draw_beside
from tensormask.evaluation.results import detections_of, read_results
from tensormask.report.runs import Evaluation
from tensormask.utils.errors import UserError
from tensormask.visualization.grid import shrink
from tensormask.visualization.html.page import image_uri

WIDTH = 900  # pixels of an image beside its ground truth

logger = logging.getLogger(__name__)


def choose_images(evaluations: Sequence[Evaluation], number: int) -> tuple[list[Any], list[Any]]:
    """Return the ids of the `number` best images, best first, and of the worst, worst first.

    It is the mean quality of the evaluations that counts. No image is among both.
    """
    qualities: dict[Any, list[float]] = {}
    for evaluation in evaluations:
        for row in rows_of(evaluation).values():
            if row["quality"] is not None:
                qualities.setdefault(row["image_id"], []).append(row["quality"])
    ordered = sorted(qualities, key=lambda image_id: -fmean(qualities[image_id]))
    number = min(number, len(ordered) // 2)
    return ordered[:number], ordered[::-1][:number]


def rows_of(evaluation: Evaluation) -> dict[Any, dict[str, Any]]:
    """Return what `details.image_quality` says of each image, by masks if there are any, by id."""
    of_task = evaluation.details.get("segm") or evaluation.details["bbox"]
    return {row["image_id"]: row for row in of_task["images"]}


def draw_images(
    evaluations: Mapping[str, Evaluation], image_ids: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    """Draw the detections of runs on images of one data set.

    Args:
        evaluations: on the same set, by the name of the run.

    Returns:
        By id of the image `file` and `runs`, a list of dicts with the run's `name`, the `uri` of
        its drawing, and its numbers of `rows_of`; `{}` if the data set or an image of it is not
        available, which is logged.
    """
    try:
        return _draw(evaluations, image_ids)
    except (UserError, OSError) as error:
        logger.warning("The report has no images: %s", error)
        return {}


def _draw(
    evaluations: Mapping[str, Evaluation], image_ids: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    name = next(iter(evaluations.values())).details["dataset"]
    dataset = get_dataset(name)
    if not {*image_ids} <= {*dataset.image_ids}:
        raise UserError(f"{name} has other images now than at the evaluation")
    drawn: dict[Any, dict[str, Any]] = {}
    for image_id in image_ids:
        drawn[image_id] = {"file": dataset.image(image_id)["file_name"], "runs": []}
    for run, evaluation in evaluations.items():
        of_task = evaluation.details.get("segm") or evaluation.details["bbox"]
        threshold, rows = of_task["threshold"], rows_of(evaluation)
        results: dict[Any, list[Any]] = {image_id: [] for image_id in image_ids}
        for result in read_results(evaluation.results):
            if result["image_id"] in results and result["score"] > threshold:
                results[result["image_id"]].append(result)
        for image_id, of_image in results.items():
            found = detections_of(of_image, dataset.category_ids)
            rgb, _ = dataset.load(image_id)
            panel = draw_beside(rgb, dataset, image_id, found, threshold)
            entry = {"name": run, "uri": image_uri(shrink(panel, WIDTH)), **rows[image_id]}
            drawn[image_id]["runs"].append(entry)
    return drawn
