"""COCO's box and mask AP of a model on a data set: runs the model, and has `scoring` do the rest.

Letters: K detections or objects.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tensormask.data.checks.annotations import sort_key
from tensormask.data.checks.issues import Identity
from tensormask.evaluation.drawing import evenly_spread, write_images
from tensormask.evaluation.results import (
    Detections,
    ResultsWriter,
    coco_results,
    merge_results,
    read_results,
)
from tensormask.evaluation.scoring import Metrics, metrics_and_curves_of
from tensormask.evaluation.submission import write_submission
from tensormask.modeling import TensorMask
from tensormask.utils.errors import UserError

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
    num_visualized: int = 0,
    submission_name: str = "tensormask",
    rank: int = 0,
    gather: Callable[[Any], list[Any]] = lambda found: [found],
) -> dict[str, Metrics]:
    """Runs `model` over `loader` and scores its detections against `dataset`'s annotations.

    Detections become run-length codes object by object and go to a file image by image, from
    which they are read for scoring: while the model runs, memory does not grow.

    Several processes may have a part of the images each, `loader` that of `image_ids[rank ::
    number of processes]`. Each writes a file of its own into `output_dir`, which must be the same
    folder for all; rank 0 makes one of them, scores it, and alone has results to return.

    The model runs in evaluation mode; the mode of each of its modules is restored afterwards.

    Args:
        model: a `TensorMask`, or anything that is called as `model(images, output_sizes=[(height,
            width), ...])` and returns per image `boxes (K, 4)`, `scores (K,)`, `labels (K,)` and,
            unless it has no mask head, bool `masks (K, height, width)`.
        loader: yields lists of samples with `image`, `image_id`, `height` and `width`. Those whose
            `image` is None, since it cannot be read, are left out: their objects count as missed.
        dataset: a `CocoDataset`; all of its `image_ids` count, seen or not.
        output_dir: where `coco_instances_results.json`, `precision_recall.json` (of
            `precision_curves`), `images/` and `montage.png` go, and the files for COCO's
            server (`write_submission`) if the data set has no annotations; None writes nothing but
            a temporary file.
        max_dets: detections per image and class for `AP@<max_dets>` and `AR@<max_dets>`, which
            are added when it is not 100.
        num_visualized: how many images are drawn, spread evenly over the data set.
        submission_name: the name of the method in the files for COCO's server.
        rank: the number of this process, from 0.
        gather: gives what each process has called it with, by rank, once all of them have.

    Returns:
        `{"bbox": metrics, "segm": metrics}` as of `evaluate_results`; without "segm" for a model
        without masks; `{}` when the data set has no annotations (test-dev), and above rank 0.

    Raises:
        ValueError: a label that the data set has no category for; boxes or scores that are not
            finite; masks of another size than their image; an image that comes twice, or is not
            of the data set.
    """
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)

        found = gather(_write_detections(model, loader, dataset, _part(folder, rank), rank == 0))
        if rank > 0:
            return {}
        path = folder / RESULTS_FILE
        _join(found, dataset, path)
        if output_dir is not None:
            seen = {image_id for each in found for image_id in each.seen}
            chosen = evenly_spread(dataset.image_ids, num_visualized)
            write_images(folder, dataset, [i for i in chosen if i in seen], path)
            logger.info("%d detections written to %s", sum(f.num_results for f in found), path)
        if not dataset.has_annotations:
            logger.warning("%s has no annotations: nothing is scored", dataset.name)
            if output_dir is not None:
                write_submission(path, dataset.name, submission_name)
            return {}
        coco_gt = dataset.to_coco()
        metrics, curves = {}, {}
        for iou_type in ("bbox", "segm") if all(f.has_masks for f in found) else ("bbox",):
            metrics[iou_type], curves[iou_type] = metrics_and_curves_of(
                coco_gt,
                read_results(path),
                iou_type,
                dataset.class_names,
                category_ids=dataset.category_ids,
                image_ids=dataset.image_ids,
                max_dets=max_dets,
            )
        if output_dir is not None:
            (folder / CURVES_FILE).write_text(json.dumps(curves))
        return metrics


class _Found(NamedTuple):
    """What a process says of the detections that it has written."""

    num_results: int
    has_masks: bool
    seen: list[Identity]  # the images that the model has had
    unreadable: list[Identity]


def _part(folder: Path, rank: int) -> Path:
    return folder / f".{RESULTS_FILE}.part{rank}"


def _write_detections(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    dataset: Any,
    path: Path,
    show_progress: bool,
) -> _Found:
    """Writes the detections in all images of a loader to a file."""
    has_masks = True
    expected = set(dataset.image_ids)
    seen: list[Identity] = []
    unreadable: list[Identity] = []
    # disable=None: on a terminal only.
    progress = tqdm(loader, desc="evaluation", disable=None if show_progress else True, leave=False)
    with evaluation_mode(model), torch.inference_mode(), ResultsWriter(path) as writer:
        for samples in progress:
            _take_from(expected, samples, dataset.name)
            unreadable += [sample["image_id"] for sample in samples if sample["image"] is None]
            samples = [sample for sample in samples if sample["image"] is not None]
            if not samples:
                continue
            sizes = [(sample["height"], sample["width"]) for sample in samples]
            batch = _detect(model, [sample["image"] for sample in samples], sizes)
            for sample, size, detections in zip(samples, sizes, batch, strict=True):
                has_masks &= bool({"masks", "window_masks"} & detections.keys())
                image_id = sample["image_id"]
                writer.add(coco_results(detections, image_id, dataset.category_ids, size))
                seen.append(image_id)
    return _Found(writer.num_results, has_masks, seen, unreadable)


def _join(found: Sequence[_Found], dataset: Any, path: Path) -> None:
    """Makes one file of the processes' own, and says which images are missing in it."""
    parts = [_part(path.parent, rank) for rank in range(len(found))]
    if len(parts) == 1:
        parts[0].replace(path)
    else:
        merge_results(parts, path, dataset.image_ids)
    for leftover in path.parent.glob(f".*{RESULTS_FILE}.part*"):  # also of killed evaluations
        leftover.unlink()
    unreadable = [image_id for each in found for image_id in each.unreadable]
    missing = set(dataset.image_ids).difference(unreadable, *(each.seen for each in found))
    for ids, reason in ((unreadable, "cannot be read"), (missing, "did not come from the loader")):
        if ids:
            logger.warning(
                "%d of %d images of %s %s, their objects count as missed; the first ids: %s",
                len(ids),
                len(dataset.image_ids),
                dataset.name,
                reason,
                ", ".join(map(str, sorted(ids, key=sort_key)[:5])),
            )


def _take_from(expected: set[Identity], samples: list[dict[str, Any]], name: str) -> None:
    """Takes the samples' ids out of those that are still to come."""
    for image_id in (sample["image_id"] for sample in samples):
        if image_id not in expected:
            raise UserError(
                f"the loader gave image {image_id!r}, which {name} does not have "
                "or which came before"
            )
        expected.remove(image_id)


def _detect(
    model: nn.Module, images: list[Tensor], output_sizes: list[tuple[int, int]]
) -> list[Detections]:
    """Detections, with masks in their windows if the model can: in frames they take more memory."""
    if isinstance(model, TensorMask):
        return model.detect(images, output_sizes)
    return model(images, output_sizes=output_sizes)


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
