"""COCO's box and mask AP of a model on a data set, by pycocotools.

`evaluate` runs the model; `evaluate_results` scores detections that are already in COCO's results
format, whoever made them. Letters: K detections or objects, (H, W) the picture.
"""

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

from tensormask.evaluation.ground_truth import scorable_copy
from tensormask.evaluation.pictures import PictureWriter

Detections = Mapping[str, Tensor]
Metrics = dict[str, float]

RESULTS_FILE = "coco_instances_results.json"
STANDARD_MAX_DETS = (1, 10, 100)
AREA_RANGES = {"APs": 1, "APm": 2, "APl": 3}  # metric -> index on COCOeval's area axis; 0 is all

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    dataset: Any,
    output_dir: str | Path | None = None,
    *,
    max_dets: int = 100,
    num_visualized: int = 0,
) -> dict[str, Metrics]:
    """Runs `model` over `loader` and scores its detections against `dataset`'s annotations.

    Detections become run-length codes picture by picture, so memory does not grow with the masks.
    The model runs in evaluation mode; the mode of each of its modules is restored afterwards.

    Args:
        model: called as `model(images, output_sizes=[(height, width), ...])`; returns per image
            `boxes (K, 4)`, `scores (K,)`, `labels (K,)` and, unless it has no mask head, bool
            `masks (K, height, width)`.
        loader: yields lists of samples with `image`, `image_id`, `height` and `width`.
        dataset: a `CocoDataset`; all of its `image_ids` count, seen or not.
        output_dir: where `coco_instances_results.json`, `pictures/` and `contact_sheet.png` go;
            None writes nothing.
        max_dets: detections per picture and class for `AP@<max_dets>` and `AR@<max_dets>`, which
            are added when it is not 100.
        num_visualized: how many pictures are drawn, spread evenly over the data set.

    Returns:
        `{"bbox": metrics, "segm": metrics}` as of `evaluate_results`; without "segm" for a model
        without masks; `{}` when the data set has no annotations (test-dev).

    Raises:
        ValueError: a label that the data set has no category for.
    """
    pictures = None
    if output_dir is not None:
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        pictures = PictureWriter(output_dir, dataset, num_visualized)

    results = []
    iou_types = ("bbox", "segm")
    with evaluation_mode(model), torch.inference_mode():
        for samples in tqdm(loader, desc="evaluation", disable=None, leave=False):
            output_sizes = [(sample["height"], sample["width"]) for sample in samples]
            batch = model([sample["image"] for sample in samples], output_sizes=output_sizes)
            for sample, detections in zip(samples, batch, strict=True):
                if "masks" not in detections:
                    iou_types = ("bbox",)
                results += coco_results(detections, sample["image_id"], dataset.category_ids)
                if pictures is not None:
                    pictures.add(sample["image_id"], detections)

    if output_dir is not None:
        pictures.finish()
        path = output_dir / RESULTS_FILE
        path.write_text(json.dumps(results), encoding="utf-8")
        logger.info("%d detections written to %s", len(results), path)
    if not dataset.coco.anns:
        logger.warning("%s has no annotations: nothing is scored", dataset.name)
        return {}
    return evaluate_results(
        dataset.coco,
        results,
        dataset.class_names,
        category_ids=dataset.category_ids,
        image_ids=dataset.image_ids,
        iou_types=iou_types,
        max_dets=max_dets,
    )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` into evaluation mode, and every module back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """One picture's detections in COCO's results format, ready for JSON.

    Args:
        detections: `boxes (K, 4)` float xyxy in pixels, `scores (K,)`, `labels (K,)` int64 from 0,
            and optionally `masks (K, H, W)` bool, on any device.
        category_ids: the COCO category id of each label.

    Returns:
        K dicts with `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and, where
        there are masks, `segmentation` as `{"size": [H, W], "counts": str}`.

    Raises:
        ValueError: a label outside `category_ids`.
    """
    labels = detections["labels"].tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: labels from {min(labels)} to {max(labels)} were detected, but the "
            f"data set has {len(category_ids)} categories; set MODEL.TENSOR_MASK.NUM_CLASSES to it"
        )
    boxes = detections["boxes"].double().cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes, detections["scores"].tolist(), strict=True)
    ]
    if "masks" in detections:
        for result, mask in zip(results, detections["masks"], strict=True):
            result["segmentation"] = encode_mask(mask)
    return results


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed run-length code of a bool `mask (H, W)`, with `counts` a str for JSON."""
    # Runs go down the columns. The transposed copy is of one mask only, made where the mask lies.
    columns = mask.bool().t().contiguous().cpu().numpy().view(np.uint8)
    code = rle_tools.encode(columns.T)
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def evaluate_results(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    category_ids: Sequence[int] | None = None,
    image_ids: Sequence[int] | None = None,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int = 100,
) -> dict[str, Metrics]:
    """Scores detections in COCO's results format. Neither `coco_gt` nor `results` is changed.

    Args:
        class_names: name of each category, in the order of `category_ids`.
        category_ids: the categories that count; None is all of them, by ascending id.
        image_ids: the pictures that count; None is all of them.
        iou_types: "bbox", "segm" or both; "segm" needs a `segmentation` in each result.
        max_dets: see `evaluate`.

    Returns:
        Per IoU type, in percent, NaN where there is no object to find: `AP`, `AP50`, `AP75`, `APs`,
        `APm`, `APl` and `AP-<class>` at 100 detections per picture and class, and `AP@<max_dets>`
        and `AR@<max_dets>` when `max_dets` is not 100.

    Raises:
        ValueError: names and categories of unequal number; results of pictures that `coco_gt` does
            not have; "segm" for results without masks.
    """
    category_ids = sorted(coco_gt.getCatIds()) if category_ids is None else list(category_ids)
    image_ids = sorted(coco_gt.getImgIds()) if image_ids is None else list(image_ids)
    if len(class_names) != len(category_ids):
        raise ValueError(f"{len(class_names)} class names for {len(category_ids)} categories")
    return {
        iou_type: summarize(
            score(
                coco_gt,
                results,
                iou_type,
                category_ids=category_ids,
                image_ids=image_ids,
                max_dets=max_dets,
            ),
            _distinct_names(class_names, category_ids),
            category_ids,
            max_dets=max_dets,
        )
        for iou_type in iou_types
    }


def score(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    *,
    category_ids: Sequence[int],
    image_ids: Sequence[int],
    max_dets: int = 100,
) -> COCOeval:
    """pycocotools' accumulated evaluation of `results`; the rest as in `evaluate_results`.

    Its `params.maxDets` holds 1, 10, 100 and `max_dets`.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        ground_truth = scorable_copy(coco_gt, image_ids, iou_type)
        found = _loaded_results(ground_truth, results, iou_type)
        coco_eval = COCOeval(ground_truth, found, iou_type)
        coco_eval.params.imgIds = list(image_ids)
        coco_eval.params.catIds = list(category_ids)
        coco_eval.params.maxDets = sorted({*STANDARD_MAX_DETS, max_dets})
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


def summarize(
    coco_eval: COCOeval,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    max_dets: int = 100,
) -> Metrics:
    """The metrics of `evaluate_results` from an accumulated evaluation.

    COCOeval's own summary knows three limits of detections only and reads the third for most
    numbers, hence this one; at 100 detections both give the same bits.
    """
    params = coco_eval.params
    precision = coco_eval.eval["precision"]  # (thresholds, recalls, classes, areas, limits)
    at_100 = precision[..., params.maxDets.index(100)]
    metrics = {
        "AP": _mean_percent(at_100[:, :, :, 0]),
        "AP50": _mean_percent(at_100[params.iouThrs == 0.5, :, :, 0]),
        "AP75": _mean_percent(at_100[params.iouThrs == 0.75, :, :, 0]),
    }
    for metric, area in AREA_RANGES.items():
        metrics[metric] = _mean_percent(at_100[:, :, :, area])
    if max_dets != 100:
        limit = params.maxDets.index(max_dets)
        recall = coco_eval.eval["recall"]  # (thresholds, classes, areas, limits)
        metrics[f"AP@{max_dets}"] = _mean_percent(precision[:, :, :, 0, limit])
        metrics[f"AR@{max_dets}"] = _mean_percent(recall[:, :, 0, limit])
    places = {category: place for place, category in enumerate(params.catIds)}  # sorted by COCOeval
    for name, category in zip(class_names, category_ids, strict=True):
        metrics[f"AP-{name}"] = _mean_percent(at_100[:, :, places[category], 0])
    return metrics


def _mean_percent(values: np.ndarray) -> float:
    """100 times the mean of COCOeval's values; -1 marks those without objects, NaN is none left."""
    defined = values[values > -1]
    return 100 * float(np.mean(defined)) if defined.size else float("nan")


def _distinct_names(class_names: Sequence[str], category_ids: Sequence[int]) -> list[str]:
    """Names as they are, with the category id added to those that several categories share."""
    counts = Counter(class_names)
    return [
        name if counts[name] == 1 else f"{name} (id {category})"
        for name, category in zip(class_names, category_ids, strict=True)
    ]


def _loaded_results(
    ground_truth: COCO, results: Sequence[Mapping[str, Any]], iou_type: str
) -> COCO:
    """Results as a COCO object, with areas of the boxes for "bbox" and of the masks for "segm"."""
    unknown = {result["image_id"] for result in results} - ground_truth.imgs.keys()
    if unknown:
        raise ValueError(
            f"the results are of another data set: it has no picture {sorted(unknown, key=str)[:5]}"
        )
    region = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    if any(region not in result for result in results):
        raise ValueError(f"scoring {iou_type!r} needs a {region!r} in every result")
    if not results:  # COCO.loadRes looks at the first one
        empty = COCO()
        empty.dataset = ground_truth.dataset | {"annotations": []}
        empty.createIndex()
        return empty
    # loadRes takes areas from the box wherever there is one, and writes into what it is given.
    keys = ("image_id", "category_id", "score", region)
    return ground_truth.loadRes([{key: result[key] for key in keys} for result in results])
