"""Draw the detections of several models beside the ground truth, an image a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensormask.evaluation.predictions import evenly_spread, ground_truth
from tensormask.evaluation.results import Result, detections_of, read_results
from tensormask.visualization.colors import UNMATCHED, instance_color
from tensormask.visualization.grid import montage, titled
from tensormask.visualization.instances import draw_instances, save_image
from tensormask.visualization.overlap import match

SMALL = 256  # pixels; smaller images are drawn at twice their size


def draw_comparison(
    dataset: Any,
    models: Mapping[str, tuple[Path, float]],
    output: Path,
    num_images: int = 6,
) -> None:
    """Write a montage: the ground truth, then the masks of each model in the colors of the objects.

    What matches no object is red; the titles count these, and the objects without a match.

    Args:
        models: by title, a file in COCO's results format and the threshold on its scores.
        num_images: spread evenly over the data set.
    """
    image_ids = evenly_spread(dataset.image_ids, num_images)
    results = {title: _read(*model, image_ids) for title, model in models.items()}
    cells = []
    for image_id in image_ids:
        rgb, _ = dataset.load(image_id)
        boxes, labels, masks, _ = ground_truth(rgb.shape[:2], dataset, image_id)
        colors = [instance_color(row) for row in range(len(labels))]
        names = dataset.class_names
        panels = {"ground truth": _draw(rgb, boxes, labels, masks, colors, names)}
        for title, of_image in results.items():
            found = detections_of(of_image[image_id], dataset.category_ids)
            order = np.argsort(-found["scores"], kind="stable")
            found = {key: values[order] for key, values in found.items()}
            matched = match(found["boxes"], found.get("masks"), boxes, masks)
            colors = [instance_color(row) if row >= 0 else UNMATCHED for row in matched]
            missed, wrong = len(labels) - (matched >= 0).sum(), (matched < 0).sum()
            objects = found["boxes"], found["labels"], found.get("masks")
            drawn = _draw(rgb, *objects, colors, names)
            panels[f"{title}: {missed} missed, {wrong} wrong"] = drawn
        cells += [titled(panel, title) for title, panel in panels.items()]
    save_image(output, montage(cells, columns=1 + len(models)))


def _read(path: Path, threshold: float, image_ids: Sequence[Any]) -> dict[Any, list[Result]]:
    """Return the results of images, by their ids."""
    of_image: dict[Any, list[Result]] = {image_id: [] for image_id in image_ids}
    for result in read_results(path):
        if result["image_id"] in of_image and result["score"] > threshold:
            of_image[result["image_id"]].append(result)
    return of_image


def _draw(
    rgb: np.ndarray, boxes: Any, labels: Any, masks: Any, colors: Any, names: Sequence[str]
) -> np.ndarray:
    options = {"draw_boxes": False, "magnify": 2 if max(rgb.shape) <= SMALL else 1}
    return draw_instances(rgb, boxes, labels, masks, class_names=names, colors=colors, **options)
