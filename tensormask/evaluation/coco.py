"""Evaluate a model on a data set: run it, write its detections, and score them by COCO's AP.

Letters: K detections or objects.
"""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from tensormask.data.checks.annotations import sort_key
from tensormask.data.checks.issues import Identity
from tensormask.data.classes import present_classes
from tensormask.evaluation.details import DETAILS_FILE, describe_evaluation, write_details
from tensormask.evaluation.evaluators import PYCOCOTOOLS
from tensormask.evaluation.ground_truth import contiguous_ids
from tensormask.evaluation.predictions import DRAWN_SCORE, evenly_spread, write_images
from tensormask.evaluation.results import ResultsWriter, coco_results, merge_results, read_results
from tensormask.evaluation.scoring import Metrics, score
from tensormask.evaluation.submission import write_submission
from tensormask.modeling import TensorMask
from tensormask.utils.files import expand_home, wait_for_file

RESULTS_FILE = "coco_instances_results.json"
CURVES_FILE = "precision_recall.json"

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    dataset: Any,
    output_dir: str | Path | None = None,
    *,
    max_dets: int = 100,
    evaluator: str = PYCOCOTOOLS,
    boundary: bool = False,
    num_visualized: int = 0,
    submission_name: str = "tensormask",
    rank: int = 0,
    gather: Callable[[Any], list[Any]] = lambda summary: [summary],
) -> dict[str, Metrics]:
    """Run `model` over `loader` and score its detections against the annotations of `dataset`.

    Masks become run-length codes one at a time. The detections of each image are written to a
    file, from which they are read for scoring: memory does not grow while the model runs.

    Several processes can share the images: each has a `loader` of `image_ids[rank :: number of
    processes]` and the same `output_dir`. Rank 0 merges the files of all and scores them.

    The model runs in evaluation mode; the mode of each of its modules is restored afterwards.

    Args:
        model: a `TensorMask`, or anything that is called as `model(images, output_sizes=[(height,
            width), ...])` and returns per image `boxes (K, 4)`, `scores (K,)`, `labels (K,)` and,
            unless it has no mask head, bool `masks (K, height, width)`.
        loader: yields lists of samples with `image`, `image_id`, `height` and `width`. Samples
            whose `image` is None (unreadable files) are skipped: their objects count as missed.
        dataset: a `CocoDataset` with the model's labels (`data.classes.match_dataset`); all of its
            `image_ids` count, also those that the loader omits. Detections of classes that it does
            not have are left out.
        output_dir: the folder for `coco_instances_results.json`, `precision_recall.json` (see
            `precision_curves`), `evaluation.json` (see `describe_evaluation`), `images/` and
            `montage.png`, and the files for COCO's server (`write_submission`) if the data set has
            no annotations. None: only a temporary file is written.
        max_dets: detections per image and class for `AP@<max_dets>` and `AR@<max_dets>`, which
            are added when it is not 100.
        evaluator: "pycocotools" or "faster_coco_eval".
        boundary: score masks also by the IoU of their boundaries (see `run_evaluator`); needs
            "faster_coco_eval".
        num_visualized: how many images are drawn, spread evenly over the data set.
        submission_name: the name of the method in the files for COCO's server.
        rank: the number of this process, from 0.
        gather: returns the values that all processes have passed to it, ordered by rank.

    Returns:
        `{"bbox": metrics, "segm": metrics}` as of `evaluate_results`, and with `boundary` also
        "boundary"; only "bbox" for a model without masks; `{}` when the data set has no annotations
        (test-dev), and above rank 0.

    Raises:
        ValueError: a label that the data set has no category for; boxes or scores that are not
            finite; masks whose size is not their image's; an image that comes twice, or is not in
            the data set.
    """
    image_ids = dataset.image_ids
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(expand_home(output_dir))
            folder.mkdir(parents=True, exist_ok=True)

        part = _part_path(folder, rank)
        summaries = gather(_write_detections(model, loader, dataset, part, rank == 0))
        if rank > 0:
            return {}
        path = folder / RESULTS_FILE
        _merge_parts(path, [summary.num_bytes for summary in summaries], image_ids)
        _warn_of_missing_images(summaries, dataset)
        processed = {image_id for summary in summaries for image_id in summary.processed}
        drawn = [i for i in evenly_spread(image_ids, num_visualized) if i in processed]
        if output_dir is not None:
            num_results = sum(summary.num_results for summary in summaries)
            logger.info("%d detections written to %s", num_results, path)
        if not dataset.has_annotations:
            logger.warning("%s has no annotations: the detections are not scored", dataset.name)
            if output_dir is not None:
                write_images(folder, dataset, drawn, path)
                write_submission(path, dataset.name, submission_name)
            return {}
        coco_gt, (names, category_ids) = dataset.to_coco(), present_classes(dataset)
        metrics, curves = {}, {}
        details: dict[str, Any] = {
            "dataset": dataset.name,
            "seconds_per_image": _seconds_per_image(summaries),
        }
        iou_types = ("bbox", "segm", *(["boundary"] if boundary else []))
        for iou_type in iou_types if all(s.has_masks for s in summaries) else ("bbox",):
            results = read_results(path)
            scores = score(
                *(coco_gt, results, iou_type, names, category_ids, image_ids, max_dets, evaluator)
            )
            metrics[iou_type], curves[iou_type] = scores.metrics, scores.curves
            details[iou_type] = {"metrics": scores.metrics}
            if output_dir is not None and iou_type != "boundary":
                threshold = scores.metrics.get("best_f1_threshold", DRAWN_SCORE)
                details[iou_type] |= describe_evaluation(
                    *(scores.coco_eval, iou_type, scores.class_names),
                    list(contiguous_ids(image_ids)),
                    threshold,
                )
            del scores  # matches of the whole set
        if output_dir is not None:
            (folder / CURVES_FILE).write_text(json.dumps(curves), encoding="utf-8")
            write_details(folder / DETAILS_FILE, details)
            best = metrics.get("segm", metrics["bbox"])
            threshold = best.get("best_f1_threshold", DRAWN_SCORE)
            write_images(folder, dataset, drawn, path, threshold)
        return metrics


class _Summary(NamedTuple):
    """What one process has written."""

    num_results: int
    num_bytes: int
    has_masks: bool
    processed: list[Identity]  # ids of the images that the model has run on
    seconds: float  # of the model, with the conversion to results
    unreadable: list[Identity]


def _write_detections(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    dataset: Any,
    path: Path,
    show_progress: bool,
) -> _Summary:
    """Run the model on all images of a loader and write the detections to a file."""
    # `detect` returns masks in their windows, which take less memory.
    detect = model.detect if isinstance(model, TensorMask) else model
    has_masks, seconds, expected = True, 0.0, set(dataset.image_ids)
    processed: list[Identity] = []
    unreadable: list[Identity] = []
    # disable=None: on a terminal only.
    progress = tqdm(loader, desc="evaluation", disable=None if show_progress else True, leave=False)
    with evaluation_mode(model), torch.inference_mode(), ResultsWriter(path) as writer:
        for samples in progress:
            for image_id in (sample["image_id"] for sample in samples):
                if image_id not in expected:
                    raise ValueError(
                        f"the loader gave image {image_id!r} twice, or {dataset.name} does not "
                        "have this image"
                    )
                expected.remove(image_id)
            unreadable += [sample["image_id"] for sample in samples if sample["image"] is None]
            samples = [sample for sample in samples if sample["image"] is not None]
            if not samples:
                continue
            sizes = [(sample["height"], sample["width"]) for sample in samples]
            start = time.perf_counter()
            batch = detect([sample["image"] for sample in samples], output_sizes=sizes)
            for sample, size, detections in zip(samples, sizes, batch, strict=True):
                has_masks &= bool({"masks", "window_masks"} & detections.keys())
                image_id = sample["image_id"]
                writer.add(coco_results(detections, image_id, dataset.category_ids, size))
                processed.append(image_id)
            seconds += time.perf_counter() - start
    num_bytes = path.stat().st_size
    return _Summary(writer.num_results, num_bytes, has_masks, processed, seconds, unreadable)


def _seconds_per_image(summaries: Sequence[_Summary]) -> float:
    """Return the mean time of a process for an image; NaN without images."""
    num_images = sum(len(summary.processed) for summary in summaries)
    return sum(summary.seconds for summary in summaries) / num_images if num_images else math.nan


def _part_path(folder: Path, rank: int) -> Path:
    return folder / f".{RESULTS_FILE}.part{rank}"


def _merge_parts(path: Path, sizes: Sequence[int], image_ids: Sequence[Identity]) -> None:
    """Merge the files of all processes, whose sizes are in bytes, into `path`, and delete them."""
    parts = [_part_path(path.parent, rank) for rank in range(len(sizes))]
    for part, num_bytes in zip(parts, sizes, strict=True):
        wait_for_file(part, num_bytes)
    if len(parts) == 1:
        parts[0].replace(path)
    else:
        merge_results(parts, path, image_ids)
    for leftover in path.parent.glob(f".*{RESULTS_FILE}.part*"):  # also of killed evaluations
        leftover.unlink()


def _warn_of_missing_images(summaries: Sequence[_Summary], dataset: Any) -> None:
    unreadable = [image_id for summary in summaries for image_id in summary.unreadable]
    missing = set(dataset.image_ids).difference(unreadable, *(s.processed for s in summaries))
    for ids, reason in ((unreadable, "cannot be read"), (missing, "did not come from the loader")):
        if ids:
            images = f"{len(ids)} of {len(dataset.image_ids)} images of {dataset.name} {reason}"
            first_ids = ", ".join(map(str, sorted(ids, key=sort_key)[:5]))
            logger.warning(
                "%s, their objects count as missed; the first ids: %s", images, first_ids
            )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch `model` to evaluation mode, and restore the mode of each module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
