"""How many positive windows a query finds, and how much of the finest level it asks for."""

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensormask.evaluation.coco import evaluate, evaluation_mode
from tensormask.modeling import TensorMask
from tensormask.utils.errors import UserError


class QueryScores(NamedTuple):
    """Scores of a query on a data set, float32 (K,) each, in ascending order."""

    positives: Tensor  # of each positive window of the finest level
    everywhere: Tensor  # of each location of the second level

    def threshold(self, recall: float) -> float:
        """Return the highest threshold with at least this recall of positive windows.

        Raises:
            UserError: no window is positive.
        """
        if not len(self.positives):
            raise UserError(
                "no window of the finest level is positive on these images: a query has nothing "
                "to find. Train without it, or give images with small objects"
            )
        missed = int((1 - recall) * len(self.positives) + 1e-9)
        lowest = self.positives[min(missed, len(self.positives) - 1)]
        return max(0.0, float(torch.nextafter(lowest, torch.tensor(-1.0))))

    def recall(self, threshold: float) -> float:
        """Return the share of the positive windows that are asked for."""
        return float((self.positives > threshold).float().mean()) if threshold > 0 else 1.0

    def share(self, threshold: float) -> float:
        """Return the share of the finest level that is asked for."""
        return float((self.everywhere > threshold).float().mean()) if threshold > 0 else 1.0


@torch.no_grad()
def query_scores(
    model: TensorMask, loader: Iterable[list[dict[str, Any]]], dataset: Any
) -> QueryScores:
    """Return the scores of a model's query on a data set.

    Args:
        model: with a query.
        loader, dataset: as of `evaluate`.
    """
    positives, everywhere = [torch.zeros(0)], [torch.zeros(0)]
    with evaluation_mode(model):
        for sample in (s for batch in loader for s in batch if s["image"] is not None):
            logits = model.dense([sample["image"].to(model.device)]).query
            if logits is None:
                raise UserError("the model has no query: set MODEL.TENSOR_MASK.QUERY_ON to True")
            scores = logits[0, 0].float().sigmoid().cpu()
            size = sample["image"].shape[1:]
            annotations = dataset.training_annotations(sample["image_id"])
            boxes = torch.tensor([a["bbox"] for a in annotations]).view(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            scale = [size[1] / sample["width"], size[0] / sample["height"]] * 2
            grids = model.windows.grids((size[0], size[1]))
            found = model.criterion.assign([boxes * torch.tensor(scale)], grids)
            finest = found.levels()[0]
            positives.append(scores[found.y[finest] // 2, found.x[finest] // 2])
            everywhere.append(scores.flatten())
    return QueryScores(*(torch.cat(x).sort().values for x in (positives, everywhere)))


def query_table(
    model: TensorMask,
    loader: Iterable[list[dict[str, Any]]],
    dataset: Any,
    recalls: Sequence[float],
    *,
    num_timed: int = 20,
) -> list[dict[str, Any]]:
    """Return a row for the whole finest level, and for the threshold of each recall.

    Args:
        num_timed: the number of images that are detected in for the time.

    Returns:
        per threshold its ``recall`` of positive windows, the ``share`` of the finest level, the
        ``CPU s`` (of all threads, per image), and the APs of ``segm`` and ``bbox``.
    """
    query: Any = model.head.query
    given, rows = query.given_threshold, []
    try:
        query.given_threshold = 0.0
        scores = query_scores(model, loader, dataset)
        for threshold in [0.0, *(scores.threshold(recall) for recall in recalls)]:
            query.given_threshold = threshold
            results = evaluate(model, loader, dataset)
            rows.append(
                {
                    "threshold": threshold,
                    "recall": scores.recall(threshold),
                    "share": scores.share(threshold),
                    "CPU s": _time_of(model, loader, num_timed),
                    **{f"{task} AP": m["AP"] for task, m in results.items() if "AP" in m},
                }
            )
    finally:
        query.given_threshold = given
    return rows


@torch.no_grad()
def _time_of(model: TensorMask, loader: Iterable[list[dict[str, Any]]], num_images: int) -> float:
    spent, count = 0.0, 0
    with evaluation_mode(model):
        for (sample,) in loader:
            if count == num_images:
                break
            if sample["image"] is not None:
                image, start = sample["image"].to(model.device), time.process_time()
                model.detect([image])
                spent, count = spent + time.process_time() - start, count + 1
    return spent / max(1, count)
