"""TensorMask (Chen et al., arXiv 1903.12174): instance masks of an image from sliding windows.

The file reads like the paper's figure: `forward`, then backbone, pyramid and heads (`dense`), then
the losses in training, or the detections in inference.

Shapes:
    N       images of the batch
    K       objects of an image, or windows; F positive windows
    C       channels
    H, W    rows and columns of windows, on the grid of a level
    V, U    rows and columns of a mask
    level   index into the levels of the pyramid, fine to coarse
    size    index into the window sizes of a level
    n, y, x image, row and column of a window
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from tensormask.layers import crop_masks
from tensormask.layers.masks import to_device
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.box_coder import encode_boxes
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.inference import (
    Candidates,
    boxes_from_masks,
    check_score_threshold,
    find_candidates,
    masks_at_windows,
    paste_detection,
    rescale_and_clip,
)
from tensormask.modeling.inputs import (
    SIZE_DIVISOR,
    check_image,
    checked_target,
    padded_size,
    size_of,
)
from tensormask.modeling.losses import box_loss, focal_loss_star, foreground_normalizer, mask_loss
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError


class TensorMask(nn.Module):
    """The whole model.

    Args:
        backbone, fpn, head, mask_head: the parts. Without a ``mask_head`` (None), detections have
            no masks. Without a box head in ``head``, they have the boxes of their masks.
        windows: geometry of the sliding windows, with one level per level of the pyramid.
        num_classes: classes without background.
        pixel_mean, pixel_std: per channel, on the scale 0..255, in the order of ``channel_order``.
        channel_order: "RGB" or "BGR", the order that the backbone's weights expect. Images are
            always given as RGB.
        size_divisor: images are padded to multiples of this many pixels, itself a multiple of 32.
            Larger values give fewer input sizes, each of which a compiled model compiles.
        channels_last: convolve in that memory format.
        autocast_dtype: dtype of `torch.autocast` in inference, bfloat16 or float16; None for the
            dtype of the weights.
        box_weights: weights of the box offsets ``(dx, dy, dw, dh)``.
        focal_alpha, focal_gamma: of FL*.
        mask_loss_weight, mask_positive_weight: weight of the mask loss, and of the pixels of the
            object in it.
        score_threshold, num_candidates: see `inference.find_candidates`.
        nms_on: what NMS compares, the regressed "boxes" or the boxes of the "masks". The latter
            computes the masks of all candidates.
        nms_threshold: IoU above which two boxes of a class are one object; the best remains.
        class_agnostic_nms: whether two boxes of different classes can be one object, too.
        num_detections: the maximum per image.
        sum_over_ranks: see `losses.foreground_normalizer`; needed in distributed training.

    Raises:
        UserError: an option is invalid, or needs a part that is missing.
    """

    def __init__(
        self,
        backbone: ResNet,
        fpn: FPN,
        head: ClassBoxHead,
        mask_head: MaskHead | None,
        windows: Windows,
        *,
        num_classes: int = 80,
        pixel_mean: tuple[float, ...] = (103.53, 116.28, 123.675),
        pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0),
        channel_order: str = "BGR",
        size_divisor: int = SIZE_DIVISOR,
        channels_last: bool = False,
        autocast_dtype: torch.dtype | None = None,
        box_weights: tuple[float, ...] = (1.5, 1.5, 0.75, 0.75),
        focal_alpha: float = 0.3,
        focal_gamma: float = 3.0,
        mask_loss_weight: float = 2.0,
        mask_positive_weight: float = 1.5,
        score_threshold: float = 0.05,
        num_candidates: int = 6000,
        nms_on: str = "boxes",
        nms_threshold: float = 0.5,
        class_agnostic_nms: bool = False,
        num_detections: int = 100,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if nms_on not in ("boxes", "masks"):
            raise UserError(f"nms_on must be 'boxes' or 'masks', got {nms_on!r}")
        if nms_on == "boxes" and not head.with_boxes:
            raise UserError(
                "MODEL.TENSOR_MASK.NMS_ON is 'boxes', but the model has no box head (BOX_ON is "
                "False): set NMS_ON to 'masks' or BOX_ON to True"
            )
        if nms_on == "masks" and mask_head is None:
            raise UserError(
                "MODEL.TENSOR_MASK.NMS_ON is 'masks', but the model has no mask head "
                "(MODEL.MASK_ON is False): set NMS_ON to 'boxes' or MASK_ON to True"
            )
        if channel_order not in ("RGB", "BGR"):
            raise UserError(f"channel_order must be 'RGB' or 'BGR', got {channel_order!r}")
        if size_divisor < 1 or size_divisor % SIZE_DIVISOR:
            raise UserError(
                f"size_divisor (MODEL.SIZE_DIVISOR) must be a multiple of {SIZE_DIVISOR}, "
                f"got {size_divisor}"
            )
        check_score_threshold(score_threshold)
        self.backbone, self.fpn, self.head, self.mask_head = backbone, fpn, head, mask_head
        self.windows, self.num_classes = windows, num_classes
        self.channel_order, self.size_divisor = channel_order, size_divisor
        # Compute the deltas of all windows, which is best in a compiled head, or at chosen ones.
        self.dense_boxes = False
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.autocast_dtype = autocast_dtype
        self.box_weights = tuple(box_weights)
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.mask_loss_weight, self.mask_positive_weight = mask_loss_weight, mask_positive_weight
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.num_candidates, self.num_detections = num_candidates, num_detections
        self.nms_on, self.class_agnostic_nms = nms_on, class_agnostic_nms
        self.sum_over_ranks = sum_over_ranks
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    pixel_mean: Tensor
    pixel_std: Tensor

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in train mode, detections in eval mode.

        Args:
            images: per image Tensor[3, height, width], RGB, uint8 in 0..255 or floating in 0..1, of
                any sizes.
            targets: in train mode, per image ``boxes`` (K, 4) float ``(x0, y0, x1, y1)`` in
                pixels, ``labels`` (K,) int64 from 0, ``masks`` (K, height, width) bool or uint8;
                K may be 0.
            output_sizes: in eval mode, per image the ``(height, width)`` of its results; by default
                that of the image.

        Returns:
            - in train mode ``{"loss_cls", "loss_box_reg", "loss_mask"}``, scalars, per positive
              window of the batch (`losses.foreground_normalizer`);
            - in eval mode per image ``boxes`` (K, 4), ``scores`` (K,), ``labels`` (K,) and
              ``masks`` (K, height, width) bool, best first.

            ``loss_mask`` and ``masks`` need a mask head, ``loss_box_reg`` needs a box head.

        Raises:
            UserError: an image or target has an invalid shape, dtype or range, or targets are
                missing in train mode.

        Example:
            >>> from tensormask import build_model, model_zoo
            >>> model = build_model(model_zoo.get_config("tensormask_R_50_FPN_1x")).eval()
            >>> sorted(model([torch.rand(3, 64, 64)])[0])
            ['boxes', 'labels', 'masks', 'scores']
        """
        if not self.training:
            sizes = output_sizes or [size_of(image) for image in images]
            return [
                paste_detection(detection, size)
                for detection, size in zip(self.detect(images, sizes), sizes, strict=True)
            ]
        if targets is None:
            raise UserError("train mode needs targets: pass them, or call model.eval()")
        dense = self.dense(images)
        targets = [
            checked_target(target, image, self.num_classes, self.device)
            for image, target in zip(images, targets, strict=True)
        ]
        return self._losses(dense, targets)

    def dense(self, images: list[Tensor]) -> DenseOutputs:
        """Run the backbone, the pyramid, and the class and box head."""
        features = self.fpn(self.backbone(self.preprocess(images)))
        return DenseOutputs(features, *self.head(features, dense_boxes=self.dense_boxes))

    def preprocess(self, images: list[Tensor]) -> Tensor:
        """Return the normalized batch (N, 3, height, width), padded with 0 at right and bottom."""
        normalized = []
        for image in images:
            check_image(image)
            image = image.to(self.device, non_blocking=True)
            image = image.float() if image.dtype == torch.uint8 else image.float() * 255
            image = image.flip(0) if self.channel_order == "BGR" else image
            normalized.append((image - self.pixel_mean) / self.pixel_std)
        heights, widths = zip(*map(size_of, images), strict=True)
        size = padded_size(max(heights), max(widths), self.size_divisor)
        batch = normalized[0].new_zeros(len(images), 3, *size)
        batch = batch.contiguous(memory_format=self.memory_format)
        for image, padded in zip(normalized, batch, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = image
        return batch

    # ---- training ----

    def _losses(self, dense: DenseOutputs, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Assign objects to windows, and return the losses per positive window."""
        grids = [size_of(logits) for logits in dense.logits]
        assignment = assign([t["boxes"] for t in targets], self.windows, grids)
        image, y, x = assignment.image, assignment.y, assignment.x
        num_positive = len(assignment.object)
        normalizer = foreground_normalizer(num_positive, self.device, self.sum_over_ranks)
        # Rows in the objects of the whole batch.
        first = image.new_tensor([0] + [len(t["boxes"]) for t in targets]).cumsum(0)
        objects = first[image] + assignment.object
        labels = torch.cat([t["labels"] for t in targets])[objects]

        channel = assignment.size * self.num_classes + labels
        index = to_device(torch.stack([image, channel, y, x]), self.device)
        positives = [tuple(index[:, rows]) for rows in assignment.levels()]
        loss_cls = focal_loss_star(
            dense.logits, positives, alpha=self.focal_alpha, gamma=self.focal_gamma
        )
        losses = {"loss_cls": loss_cls / normalizer}
        if self.head.with_boxes:
            columns = (image, assignment.size, y, x)
            deltas_per_level = [
                self.head.deltas_at(dense, level, *(column[rows] for column in columns))
                for level, rows in enumerate(assignment.levels())
            ]
            boxes = torch.cat([t["boxes"] for t in targets])[objects]
            target_deltas = encode_boxes(boxes, assignment.boxes, self.box_weights)
            target_deltas = to_device(target_deltas, self.device)
            loss_box_reg = box_loss(torch.cat(deltas_per_level), target_deltas)
            losses["loss_box_reg"] = loss_box_reg / normalizer
        if self.mask_head is not None:
            masks = [t["masks"] for t in targets]
            losses["loss_mask"] = self._mask_loss(dense.features, assignment, masks) / normalizer
        return losses

    def _mask_loss(
        self, features: list[Tensor], assignment: Assignment, masks: list[Tensor]
    ) -> Tensor:
        """Return the mask loss of the positive windows, summed and weighted."""
        assert self.mask_head is not None
        windows = torch.stack([assignment.image, assignment.y, assignment.x], dim=1)
        windows = to_device(windows, self.device)
        groups = assignment.groups()
        # A size without positive windows gets an empty group on the coarsest level in use. Its loss
        # is 0 and gives its parameters gradients, so that momentum and weight decay still apply.
        level = groups[-1][0] if groups else self.windows.num_levels - 1
        absent = set(range(self.windows.num_sizes)) - {size for _, size, _ in groups}
        groups += [(level, size, slice(0, 0)) for size in sorted(absent)]
        logits_per_group = self.mask_head(features, [(k, s, windows[at]) for k, s, at in groups])
        losses = []
        for (level, size, at), logits in zip(groups, logits_per_group, strict=True):
            split = assignment.counts[level][size]  # by image
            objects, boxes = assignment.object[at].split(split), assignment.boxes[at].split(split)
            per_image = zip(masks, objects, boxes, strict=True)
            target = torch.cat([crop_masks(*of_image, logits.shape[-1]) for of_image in per_image])
            losses.append(mask_loss(logits, target, positive_weight=self.mask_positive_weight))
        return self.mask_loss_weight * functools.reduce(torch.add, losses)

    # ---- inference ----

    def detect(
        self,
        images: list[Tensor],
        output_sizes: list[tuple[int, int]] | None = None,
        *,
        score_threshold: float | None = None,
        num_detections: int | None = None,
        classes: Sequence[int] | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[dict[str, Tensor | list[Tensor]]]:
        """Return the detections of `forward` in eval mode, with masks that are not pasted yet.

        ``layers.paste_masks(window_masks, windows, output_size)`` returns `forward`'s ``masks``,
        and ``layers.paste_regions`` yields the same masks, each cropped to its window.

        Args:
            images, output_sizes: as of `forward`.
            score_threshold, num_detections, class_agnostic_nms: of this call; None for the model's.
            classes: labels of the objects to detect; None for all. Others neither are candidates
                nor suppress any.

        Returns:
            per image ``boxes``, ``scores`` and ``labels`` as of `forward`. With a mask head also
            ``window_masks``, K Tensor[V, U] of probabilities, and ``windows`` (K, 4), their boxes
            ``(x0, y0, x1, y1)`` in pixels of the output.

        Raises:
            UserError: an image is invalid, or an option is out of range.
        """
        torch.compiler.cudagraph_mark_step_begin()  # results of earlier calls are no longer needed
        input_sizes = [size_of(image) for image in images]
        sizes = zip(input_sizes, output_sizes or input_sizes, strict=True)
        with self._autocast():
            dense = self.dense(images)
            detections = self.find_detections(
                dense,
                score_threshold,
                num_detections=num_detections,
                classes=classes,
                class_agnostic_nms=class_agnostic_nms,
            )
            detections = [rescale_and_clip(d, *s) for d, s in zip(detections, sizes, strict=True)]
            results: list[dict[str, Tensor | list[Tensor]]] = [
                {"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in detections
            ]
            if self.mask_head is not None:
                masks = masks_at_windows(self.mask_head, dense.features, detections)
                for result, d, window_masks in zip(results, detections, masks, strict=True):
                    result.update(windows=d.windows, window_masks=window_masks)
        return results

    def find_detections(
        self,
        dense: DenseOutputs,
        score_threshold: float | None = None,
        *,
        num_detections: int | None = None,
        classes: Sequence[int] | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[Candidates]:
        """Return per image the candidates after NMS, in pixels of the network's input.

        The options are those of `detect`.
        """
        threshold = self.score_threshold if score_threshold is None else score_threshold
        limit = self.num_detections if num_detections is None else num_detections
        agnostic = self.class_agnostic_nms if class_agnostic_nms is None else class_agnostic_nms
        check_score_threshold(threshold)
        if limit < 0:
            raise UserError(f"num_detections must be >= 0, got {limit}")
        if classes is not None and not all(0 <= label < self.num_classes for label in classes):
            raise UserError(
                f"classes must be labels in 0..{self.num_classes - 1}, got {list(classes)}"
            )
        images = map(dense.image, range(len(dense.logits[0])))
        candidates_per_image = [self._find_candidates(x, threshold, classes) for x in images]
        boxes_per_image: Sequence[Tensor] = [c.boxes for c in candidates_per_image]
        if self.nms_on == "masks":
            assert self.mask_head is not None
            boxes_per_image = boxes_from_masks(self.mask_head, dense.features, candidates_per_image)
        detections = []
        for candidates, boxes in zip(candidates_per_image, boxes_per_image, strict=True):
            if not self.head.with_boxes:
                candidates = candidates._replace(boxes=boxes)
            if self.nms_on == "masks":  # drop empty masks
                rows = boxes[:, 2] > boxes[:, 0]
                candidates, boxes = candidates.select(rows), boxes[rows]
            groups = torch.zeros_like(candidates.labels) if agnostic else candidates.labels
            rows = batched_nms(boxes, candidates.scores, groups, self.nms_threshold)
            detections.append(candidates.select(rows[:limit]))
        return detections

    def _find_candidates(
        self, dense: DenseOutputs, score_threshold: float, classes: Sequence[int] | None
    ) -> Candidates:
        """Return the candidates of a batch of one image."""

        def deltas_at(level: int, size: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return self.head.deltas_at(dense, level, torch.zeros_like(y), size, y, x)

        return find_candidates(
            [x[0] for x in dense.logits],
            deltas_at if self.head.with_boxes else None,
            self.windows,
            box_weights=self.box_weights,
            score_threshold=score_threshold,
            num_candidates=self.num_candidates,
            classes=classes,
        )

    def _autocast(self) -> AbstractContextManager:
        """Return the autocast of inference; without a dtype, the caller's autocast stays active."""
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
