"""The whole model as one graph with tensors in and out, which `torch.export` can trace.

`TensorMask.detect` takes lists of images, and computes as little as the image allows: it asks for
the values of tensors in between. A graph cannot. `DetectionGraph` calls the same parts, but
computes all windows, and has a fixed number of detections, of which the last ones can be empty. The
number of windows of a level and size that are detections is the only one that depends on the image.

Letters: N images, C candidates and K detections of an image, M = N * C or N * K of them in the
batch, (V, U) rows and columns of the grid that all masks have in common.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from tensormask.layers.masks import mask_boxes
from tensormask.layers.swap_align2nat_reference import gather_region
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.candidates import Candidates, locate, logit_threshold, rows_of_windows
from tensormask.modeling.head import DenseOutputs
from tensormask.modeling.inputs import padded_size
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.parts import as_levels
from tensormask.modeling.tensormask import TensorMask

# Mask pixels beyond each border of the image: those that the interpolation reads, and rounding.
_MARGIN = 2


class DetectionGraph(nn.Module):
    """Detect the objects of images of one size, as `TensorMask.detect`.

    Differences: it is in float32 or the dtype of the weights, without autocast; and a box that has
    no area within the image makes no room for another one.

    Args:
        model: in eval mode, on the CPU.
        size: (height, width) of the images in pixels.
    """

    def __init__(self, model: TensorMask, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.padded = padded_size(*size, model.size_divisor)
        if model.mask_head is not None:
            self.regions = _MaskRegions(model, self.padded)

    @property
    def num_outputs(self) -> int:
        """K of the outputs: the model's number of detections, or of its candidates if smaller."""
        return min(self.model.num_detections, self._num_candidates)

    @property
    def _num_candidates(self) -> int:
        windows = self.model.windows
        locations = sum(height * width for height, width in self._grids)
        num_pairs = locations * windows.num_sizes * self.model.head.num_classes
        return min(self.model.num_candidates, num_pairs)

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return self.model.windows.grids(self.padded)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the detections of each image, best first.

        Args:
            images: uint8 (N, 3, height, width), RGB.

        Returns:
            - ``boxes`` (N, K, 4) float, ``(x0, y0, x1, y1)`` in pixels of the images;
            - ``scores`` (N, K) float, ``labels`` (N, K) int64;
            - ``num_detections`` (N,) int64: the rows from it on have score 0 and label -1;
            - with a mask head, ``masks`` (N, K, V, U), probabilities of the mask pixels, which
              are 0 outside of the window; and ``mask_boxes`` (N, K, 4), the box of (V, U) in pixels
              of the images, which can extend beyond them.
        """
        model = self.model
        batch = self._normalized(images)
        features = as_levels(model, "backbone", model.backbone(batch), batch)
        features = as_levels(model, "fpn", model.fpn(features), batch)
        dense = DenseOutputs(features, *model.head(features))
        found, n = self._candidates(dense)
        mask_features: list[Tensor] = []
        if model.mask_head is not None:
            mask_features = self.regions.features_of(features)
        nms_boxes = found.boxes
        if model.nms_on == "masks":
            nms_boxes = self.regions.boxes(mask_features, found, n)
            has_area = nms_boxes[:, 2] > nms_boxes[:, 0]  # not of an empty mask
            found = found._replace(scores=torch.where(has_area, found.scores, -1.0))
            if not model.head.with_boxes:
                found = found._replace(boxes=nms_boxes)
        groups = n if model.class_agnostic_nms else n * model.head.num_classes + found.labels
        scores = _suppress(nms_boxes, found.scores, groups, model.nms_threshold)
        found, n = _best(found._replace(scores=scores), images.shape[0], self.num_outputs)
        height, width = self.size
        limit = found.boxes.new_tensor([width, height, width, height])
        found = found._replace(boxes=torch.minimum(found.boxes.clamp(min=0), limit))
        has_area = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
        scores = torch.where(has_area, found.scores, -1.0)
        found, n = _best(found._replace(scores=scores), images.shape[0], self.num_outputs)
        exists = found.scores >= 0
        outputs = {
            "boxes": torch.where(exists[:, None], found.boxes, 0.0),
            "scores": found.scores.clamp(min=0),
            "labels": torch.where(exists, found.labels, -1),
        }
        if mask_features:
            outputs["masks"], outputs["mask_boxes"] = self.regions.masks(mask_features, found, n)
        outputs = {
            name: x.unflatten(0, (images.shape[0], self.num_outputs)) for name, x in outputs.items()
        }
        return {**outputs, "num_detections": exists.view(images.shape[0], -1).sum(1)}

    def _normalized(self, images: Tensor) -> Tensor:
        """Return the batch of `TensorMask.preprocess`."""
        model, (height, width), padded = self.model, self.size, self.padded
        images = images.to(torch.promote_types(model.pixel_mean.dtype, torch.float32))
        images = images.flip(1) if model.channel_order == "BGR" else images
        images = ((images - model.pixel_mean) / model.pixel_std).to(model.pixel_mean.dtype)
        return F.pad(images, (0, padded[1] - width, 0, padded[0] - height))

    def _candidates(self, dense: DenseOutputs) -> tuple[Candidates, Tensor]:
        """Return the candidates of all images, as `find_candidates`, and the image of each.

        They are flat, (M,), those of an image together. Those with score -1 are none.
        """
        model, head = self.model, self.model.head
        logits = torch.cat([x.flatten(1) for x in dense.logits], dim=1)
        logits, index = logits.topk(self._num_candidates, dim=1)
        threshold = logit_threshold(model.score_threshold, mask_iou=head.mask_iou)
        scores = torch.where(logits > threshold, logits.float().sigmoid(), -1.0)
        # NMS keeps the first of equal scores: the order is that of `find_candidates`. (The operator
        # of ONNX sorts equal values by their positions.)
        index, order = index.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True)
        index = index.gather(1, order)
        n = torch.arange(index.shape[0])[:, None].expand(index.shape).flatten()
        scores, index = scores.flatten(), index.flatten()
        num_sizes, grids = model.windows.num_sizes, self._grids
        level, size, label, y, x = locate(index, grids, num_sizes, head.num_classes)
        boxes = window_boxes = model.windows.boxes(level, size, y, x)
        if dense.deltas is not None:
            outputs_per_level = [
                d.unflatten(1, (num_sizes, head.num_outputs)).movedim(2, -1).flatten(1, 3)
                for d in dense.deltas
            ]
            outputs = torch.cat(outputs_per_level, dim=1)  # (N, windows, num_outputs)
            row = rows_of_windows(grids, num_sizes, level, size, y, x)
            outputs = outputs.flatten(0, 1)[n * outputs.shape[1] + row].float()
            boxes = decode_boxes(outputs[:, :4], window_boxes, model.criterion.box_weights)
            if head.mask_iou:
                both = (scores.clamp(min=0) * outputs[:, 4].sigmoid()).sqrt()
                scores = torch.where(both > model.score_threshold, both, -1.0)
        return Candidates(boxes, scores, label, level, size, y, x, window_boxes), n


class _MaskRegions:
    """The masks of windows of a `MaskHead` within images of one size.

    The windows of coarse levels are much larger than the image, and their masks on the bipyramid as
    fine as all others: only the region within the image is computed, on a grid that is large enough
    for every level.
    """

    def __init__(self, model: TensorMask, size: tuple[int, int]) -> None:
        assert model.mask_head is not None
        self.head: MaskHead = model.mask_head
        self.windows = model.windows
        self.has_regions = self.head.aligned and self.head.upscale == 1
        # Per level and size, pixels of the image per mask pixel, and rows and columns of a region.
        self.units: dict[tuple[int, int], float] = {}
        self.shapes: dict[tuple[int, int], tuple[int, int]] = {}
        for level, sides in enumerate(self.windows.sizes):
            for kind, side in enumerate(sides):
                num = self.head.mask_sizes[kind] * self.head.lambdas[level]
                self.units[level, kind] = unit = side / num
                whole = [math.ceil(length / unit) + 2 * _MARGIN + 1 for length in size]
                limits = whole if self.has_regions else [num, num]
                self.shapes[level, kind] = min(num, limits[0]), min(num, limits[1])
        rows, columns = zip(*self.shapes.values(), strict=True)
        self.grid = max(rows), max(columns)

    def features_of(self, features: list[Tensor]) -> list[Tensor]:
        """Return the input of the last convolutions of each level."""
        head = self.head
        finest = head.mask_subnet(features[0]) if head.bipyramid else None
        return [head.level_features(features, level, finest) for level in range(len(features))]

    def masks(self, features: list[Tensor], found: Candidates, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of the masks (M, V, U), and their boxes (M, 4); 0 without."""
        height, width = self.grid
        rows, masks, boxes = [], [], []
        for of_group, logits, corner, unit in self._groups(features, found, n):
            pad = (0, width - logits.shape[2], 0, height - logits.shape[1])
            rows.append(of_group)
            masks.append(F.pad(logits.float().sigmoid(), pad))
            opposite = corner + unit * corner.new_tensor([width, height])
            boxes.append(torch.cat([corner, opposite], dim=1))
        return _in_order(rows, masks, n), _in_order(rows, boxes, n)

    def boxes(self, features: list[Tensor], found: Candidates, n: Tensor) -> Tensor:
        """Return the boxes of the masks (M, 4), as `inference.boxes_from_masks`; 0 if empty."""
        rows, boxes = [], []
        for of_group, logits, corner, unit in self._groups(features, found, n):
            opposite = corner + unit * corner.new_tensor([logits.shape[2], logits.shape[1]])
            rows.append(of_group)
            boxes.append(mask_boxes(logits, torch.cat([corner, opposite], dim=1)))
        return _in_order(rows, boxes, n)

    def _groups(
        self, features: list[Tensor], found: Candidates, n: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """Yield per level and size: rows of the windows, logits, corners (x, y), and the unit."""
        for (level, kind), unit in self.units.items():
            is_here = (found.scores >= 0) & (found.level == level) & (found.size == kind)
            (rows,) = torch.nonzero(is_here, as_tuple=True)
            windows = torch.stack([n[rows], found.y[rows], found.x[rows]], dim=1)
            corner = found.windows[rows, :2]
            if self.has_regions:
                num = self.head.mask_sizes[kind] * self.head.lambdas[level]
                shape = self.shapes[level, kind]
                room = torch.tensor([num - shape[1], num - shape[0]])  # of (x, y)
                first = ((-corner / unit).floor().long() - _MARGIN).clamp(min=0).minimum(room)
                x = self.head.upsampled(self.head.mask_pred[kind](features[level]))
                logits = gather_region(x, windows, self.head.lambdas[level], first.flip(1), shape)
                corner = corner + first * unit
            else:
                logits = self.head.masks_at(features[level], level, kind, windows)
            yield rows, logits, corner, unit


def _best(found: Candidates, num_images: int, count: int) -> tuple[Candidates, Tensor]:
    """Return the ``count`` best of each image, sorted, and the image of each."""
    scores = found.scores.unflatten(0, (num_images, -1))
    _, row = scores.topk(count, dim=1)
    n = torch.arange(num_images)[:, None]
    return found.select((n * scores.shape[1] + row).flatten()), n.expand(row.shape).flatten()


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Return the scores (M,), -1 for boxes that a better one of their group suppresses.

    One call of NMS does it, with the boxes of each group moved to an area of their own: those of a
    square grid, because large offsets round the boxes.
    """
    exists = scores >= 0
    boxes = torch.where(exists[:, None], boxes, 0.0)
    low = boxes.min()
    step = boxes.max() - low + 1
    columns = (groups.max() + 1).float().sqrt().ceil().long()
    area = torch.stack([groups % columns, groups // columns], dim=1).to(boxes.dtype)
    boxes = boxes - low + (area * step).repeat(1, 2)
    # What is none comes last, and suppresses itself: the time of NMS grows with what remains.
    boxes = torch.where(exists[:, None], boxes, boxes.new_tensor([-2.0, -2.0, -1.0, -1.0]))
    remaining = nms(boxes, scores, threshold)
    return torch.full_like(scores, -1.0).scatter(0, remaining, scores[remaining])


def _in_order(rows: list[Tensor], values: list[Tensor], like: Tensor) -> Tensor:
    """Return the values of all rows (M, ...) from those of parts of the rows; 0 for others."""
    row = torch.cat(rows)
    place = torch.full_like(like, row.shape[0]).scatter(0, row, torch.arange(row.shape[0]))
    zero = values[0].new_zeros(1, *values[0].shape[1:])
    return torch.cat([*values, zero])[place]
