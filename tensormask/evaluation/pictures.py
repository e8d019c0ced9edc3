"""Pictures of an evaluation: predictions beside ground truth, and a contact sheet of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from torch import Tensor

from tensormask.data.faults import Identity
from tensormask.data.segmentation import segmentation_to_rle
from tensormask.evaluation.results import Detections
from tensormask.layers import paste_masks
from tensormask.sheets import contact_sheet, shrink, side_by_side
from tensormask.visualizer import draw_instances, save_picture, unique_stem

DRAWN_SCORE = 0.3
SHEET_COLUMNS = 2
SHEET_CELL_WIDTH = 800


class PictureWriter:
    """Draws some pictures of a data set while its evaluation runs.

    `add` takes every picture's detections and draws those of `num_pictures` pictures, spread evenly
    over the data set, to `<output_dir>/pictures/<stem>.png`; `finish` writes
    `<output_dir>/contact_sheet.png`. Only the sheet's small copies stay in memory.
    """

    def __init__(self, output_dir: Path, dataset: Any, num_pictures: int) -> None:
        self.output_dir = output_dir
        self.dataset = dataset
        self.chosen_ids = set(evenly_spread(dataset.image_ids, num_pictures))
        self.stems: set[str] = set()
        self.sheet: list[np.ndarray] = []

    def add(self, image_id: Identity, detections: Detections) -> None:
        if image_id not in self.chosen_ids:
            return
        rgb, _ = self.dataset.load(image_id)
        predicted = draw_predictions(rgb, detections, self.dataset.class_names)
        truth, num_crowds = draw_ground_truth(rgb, self.dataset, image_id)
        truth_title = "ground truth"
        if num_crowds:
            truth_title += f", without {num_crowds} crowd" + "s" * (num_crowds > 1)
        titles = (f"predicted, score >= {DRAWN_SCORE}", truth_title)
        picture = side_by_side(predicted, truth, titles)
        file_name = Path(self.dataset.image(image_id)["file_name"])
        stem = unique_stem(file_name.stem, self.stems)
        save_picture(self.output_dir / "pictures" / f"{stem}.png", picture)
        self.sheet.append(shrink(picture, SHEET_CELL_WIDTH))

    def finish(self) -> None:
        if self.sheet:
            sheet = contact_sheet(self.sheet, columns=SHEET_COLUMNS)
            save_picture(self.output_dir / "contact_sheet.png", sheet)


def evenly_spread(items: Sequence, count: int) -> list:
    """`count` of `items` (all of them if there are fewer), from the first to the last, in order."""
    count = min(count, len(items))
    if count == 0:
        return []
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[place] for place in places]


def draw_predictions(
    rgb: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    min_score: float = DRAWN_SCORE,
) -> np.ndarray:
    """`rgb (H, W, 3)` with the detections that score at least `min_score` drawn into it."""
    keep = detections["scores"] >= min_score
    return draw_instances(
        rgb,
        detections["boxes"][keep],
        detections["labels"][keep],
        _masks_of(detections, keep, rgb.shape[:2]),
        detections["scores"][keep],
        class_names,
    )


def _masks_of(detections: Detections, keep: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The masks of chosen detections, bool `(K, H, W)`; None for detections without masks."""
    if "masks" in detections:
        return detections["masks"][keep]
    if "window_masks" not in detections:
        return None
    masks = [
        mask for mask, kept in zip(detections["window_masks"], keep.tolist(), strict=True) if kept
    ]
    return paste_masks(masks, detections["windows"][keep], size)


def draw_ground_truth(rgb: np.ndarray, dataset: Any, image_id: Identity) -> tuple[np.ndarray, int]:
    """`rgb (H, W, 3)` with its annotated objects, and the number of crowds, which are left out."""
    annotations = dataset.annotations(image_id)
    objects = [a for a in annotations if not a["iscrowd"] and (a["bbox"] or a["segmentation"])]
    masks = np.zeros((len(objects), *rgb.shape[:2]), bool)
    boxes = np.zeros((len(objects), 4))
    for mask, box, annotation in zip(masks, boxes, objects, strict=True):
        code = None
        if annotation["segmentation"]:
            code = segmentation_to_rle(annotation["segmentation"], mask.shape)
            mask[:] = rle_tools.decode(code)
        box[:] = annotation["bbox"] or rle_tools.toBbox(code)
    boxes[:, 2:] += boxes[:, :2]
    labels = [dataset.label_of(annotation) for annotation in objects]
    picture = draw_instances(rgb, boxes, labels, masks, class_names=dataset.class_names)
    return picture, sum(annotation["iscrowd"] for annotation in annotations)
