"""TensorMask (Chen et al., arXiv 1903.12174): images to masks through sliding windows.

Letters: N images, K objects or windows, C channels, (V, U) rows and columns of a mask, (H, W)
rows and columns of windows.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tensormask.layers import crop_masks
from tensormask.layers.masks import to_device
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.box_coder import encode_boxes
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead
from tensormask.modeling.inference import (
    Kept,
    find_candidates,
    group_windows,
    suppress,
    to_frame,
    ungroup_masks,
    with_boxes_of_masks,
    with_frames,
)
from tensormask.modeling.inputs import SIZE_DIVISOR, check_image, checked_target, padded_size
from tensormask.modeling.losses import box_loss, focal_loss_star, foreground_normalizer, mask_loss
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError


class TensorMask(nn.Module):
    """The whole model.

    Args:
        backbone, fpn, head, mask_head: the parts. ``mask_head`` None: boxes only. A ``head``
            without boxes: detections have the boxes of their masks.
        windows: geometry of the sliding windows, a level of it per level of the pyramid.
        num_classes: classes, background not counted.
        pixel_mean, pixel_std: per channel, on the scale 0..255, in the order of ``channel_order``.
        channel_order: "RGB" or "BGR", what the backbone's weights were trained with. Images are
            always given as RGB.
        size_divisor: images are padded to multiples of this many pixels, itself one of 32. Larger
            ones give fewer input sizes, for which a compiled model is compiled.
        channels_last: convolve in that memory format.
        autocast_dtype: inference in this dtype where `torch.autocast` takes it, bfloat16 or
            float16; None for the weights' own.
        box_weights: weights of the box offsets ``(dx, dy, dw, dh)``.
        focal_alpha, focal_gamma: of FL*.
        mask_loss_weight, mask_positive_weight: weight of the mask loss, and of the pixels of the
            object in it.
        score_threshold, num_candidates: see `inference.find_candidates`.
        nms_on: what NMS compares, the regressed "boxes" or the boxes of the "masks", for which the
            masks of all candidates are made.
        nms_threshold, num_detections: see `inference.suppress`.

    Raises:
        ValueError: an option that does not exist, or that needs a part which is not there.
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
        num_detections: int = 100,
    ) -> None:
        super().__init__()
        if nms_on not in ("boxes", "masks"):
            raise UserError(f"nms_on must be 'boxes' or 'masks', got {nms_on!r}")
        if nms_on == "boxes" and head.bbox_pred is None:
            raise UserError(
                "there is no box head: NMS needs the boxes of the masks; set "
                "MODEL.TENSOR_MASK.NMS_ON to masks, or MODEL.TENSOR_MASK.BOX_ON to True"
            )
        if nms_on == "masks" and mask_head is None:
            raise UserError(
                "there is no mask head whose boxes NMS could compare: set "
                "MODEL.TENSOR_MASK.NMS_ON to boxes, or MODEL.MASK_ON to True"
            )
        if channel_order not in ("RGB", "BGR"):
            raise UserError(f"channel_order must be 'RGB' or 'BGR', got {channel_order!r}")
        if size_divisor < 1 or size_divisor % SIZE_DIVISOR:
            raise UserError(
                f"size_divisor (MODEL.SIZE_DIVISOR) must be a multiple of {SIZE_DIVISOR}, "
                f"got {size_divisor}"
            )
        if not 0 <= score_threshold < 1:
            raise UserError(f"score_threshold must be in 0..1, below 1, got {score_threshold}")
        self.backbone, self.fpn, self.head, self.mask_head = backbone, fpn, head, mask_head
        self.windows = windows
        self.num_classes = num_classes
        self.channel_order = channel_order
        self.size_divisor = size_divisor
        # Deltas of all boxes at once, as a compiled head makes them, or where they are asked for.
        self.dense_boxes = False
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.autocast_dtype = autocast_dtype
        self.box_weights = tuple(box_weights)
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.mask_loss_weight, self.mask_positive_weight = mask_loss_weight, mask_positive_weight
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.num_candidates, self.num_detections = num_candidates, num_detections
        self.nms_on = nms_on
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in train mode, detections in eval mode.

        Args:
            images: per image Tensor[3, H, W], RGB, uint8 in 0..255 or floating in 0..1, of any
                sizes.
            targets: in train mode, per image ``boxes`` (K, 4) float ``(x0, y0, x1, y1)`` in
                pixels, ``labels`` (K,) int64 from 0, ``masks`` (K, H, W) bool or uint8. K may be 0.
            output_sizes: in eval mode, per image the ``(height, width)`` that results are wanted
                in; by default the image's own.

        Returns:
            in train mode ``{"loss_cls", "loss_box_reg", "loss_mask"}``, scalars, per foreground
            window of the batch (`losses.foreground_normalizer`); in eval mode per image ``boxes``
            (K, 4), ``scores`` (K,), ``labels`` (K,) and ``masks`` (K, height, width) bool, best
            first. Without a mask head, ``loss_mask`` and ``masks`` are left out, without a box head
            ``loss_box_reg`` is.

        Raises:
            ValueError: an image or target of another shape, dtype or range, or targets missing in
                train mode.
        """
        if not self.training:
            sizes = output_sizes or [tuple(image.shape[-2:]) for image in images]
            return [
                with_frames(detection, size)
                for detection, size in zip(self.detect(images, sizes), sizes, strict=True)
            ]
        if targets is None:
            raise UserError("targets are needed in train mode; call model.eval() for detections")
        features, logits, deltas = self.dense(images)
        targets = [
            checked_target(target, image, self.num_classes, self.device)
            for image, target in zip(images, targets, strict=True)
        ]
        return self._losses(features, logits, deltas, targets)

    def dense(self, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """Per level features, logits of classes, and deltas of boxes, if those are dense."""
        features = self.fpn(self.backbone(self.preprocess(images)))
        return features, *self.head(features, dense_boxes=self.dense_boxes)

    def _deltas_at(
        self,
        features: list[Tensor],
        deltas: list[Tensor] | None,
        level: int,
        place: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Deltas (K, 4) of windows of a level: n, size, y, x. The first two are of `dense`."""
        if deltas is None:
            return self.head.deltas_at(features[level], *place)
        n, size, y, x = to_device(torch.stack(place), self.device)
        return deltas[level].unflatten(1, (-1, 4))[n, size, :, y, x]

    def preprocess(self, images: list[Tensor]) -> Tensor:
        """Normalise, and pad right and bottom with zeros to ``size_divisor``: (N, 3, H, W)."""
        normalized = []
        for image in images:
            check_image(image)
            image = image.to(self.device, non_blocking=True)
            image = image.float() if image.dtype == torch.uint8 else image.float() * 255
            if self.channel_order == "BGR":
                image = image.flip(0)
            normalized.append((image - self.pixel_mean) / self.pixel_std)
        largest = (max(x.shape[axis] for x in images) for axis in (1, 2))
        height, width = padded_size(*largest, self.size_divisor)
        batch = normalized[0].new_zeros(len(images), 3, height, width)
        batch = batch.contiguous(memory_format=self.memory_format)
        for image, place in zip(normalized, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch

    # ---- training ----

    def _losses(
        self,
        features: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor] | None,
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        grids = [tuple(x.shape[-2:]) for x in logits]
        owned = assign([t["boxes"] for t in targets], self.windows, grids)
        normalizer = foreground_normalizer(len(owned.object), self.device)
        # Objects of the whole batch, one after the other.
        first = owned.image.new_tensor([0] + [len(t["boxes"]) for t in targets]).cumsum(0)
        objects = first[owned.image] + owned.object
        labels = torch.cat([t["labels"] for t in targets])[objects]

        channel = owned.size * self.num_classes + labels
        index = torch.stack([owned.image, channel, owned.y, owned.x])
        n, channel, y, x = to_device(index, self.device)
        positives = [(n[at], channel[at], y[at], x[at]) for at in owned.levels()]
        loss_cls = focal_loss_star(
            logits, positives, alpha=self.focal_alpha, gamma=self.focal_gamma
        )
        losses = {"loss_cls": loss_cls / normalizer}
        if self.head.bbox_pred is not None:
            places = (owned.image, owned.size, owned.y, owned.x)
            deltas_at_windows = [
                self._deltas_at(features, deltas, level, tuple(t[at] for t in places))
                for level, at in enumerate(owned.levels())
            ]
            boxes = torch.cat([t["boxes"] for t in targets])[objects]
            target_deltas = encode_boxes(boxes, owned.boxes, self.box_weights)
            target_deltas = to_device(target_deltas, self.device)
            loss_box_reg = box_loss(torch.cat(deltas_at_windows), target_deltas)
            losses["loss_box_reg"] = loss_box_reg / normalizer
        if self.mask_head is not None:
            masks = [t["masks"] for t in targets]
            losses["loss_mask"] = self._mask_loss(features, owned, masks) / normalizer
        return losses

    def _mask_loss(self, features: list[Tensor], owned: Assignment, masks: list[Tensor]) -> Tensor:
        rows = to_device(torch.stack([owned.image, owned.y, owned.x], dim=1), self.device)
        groups = owned.groups()
        # A size that owns nothing gets no window of the coarsest level in use: its loss is 0 and
        # reaches its parameters, so that momentum and weight decay act on them in every step.
        level = groups[-1][0] if groups else self.windows.num_levels - 1
        absent = set(range(self.windows.num_sizes)) - {size for _, size, _ in groups}
        groups += [(level, size, slice(0, 0)) for size in sorted(absent)]
        logits_per_group = self.mask_head(features, [(k, s, rows[at]) for k, s, at in groups])
        total = 0
        for (level, size, at), logits in zip(groups, logits_per_group, strict=True):
            target = torch.cat(
                [
                    crop_masks(masks_of_image, objects, windows, logits.shape[-1])
                    for masks_of_image, objects, windows in zip(
                        masks,
                        owned.object[at].split(owned.counts[level][size]),
                        owned.boxes[at].split(owned.counts[level][size]),
                        strict=True,
                    )
                ]
            )
            total = total + mask_loss(logits, target, positive_weight=self.mask_positive_weight)
        return self.mask_loss_weight * total

    # ---- inference ----

    def detect(
        self, images: list[Tensor], output_sizes: list[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor | list[Tensor]]]:
        """The detections of `forward` in eval mode, with masks as small as the head made them.

        ``layers.paste_masks(window_masks, windows, output_size)`` gives `forward`'s ``masks``, and
        ``layers.paste_regions`` the same bits one object at a time.

        Args:
            images, output_sizes: as of `forward`.

        Returns:
            per image ``boxes``, ``scores`` and ``labels`` as of `forward` and, unless there is no
            mask head, ``window_masks``, K Tensor[V, U] of probabilities, and ``windows`` (K, 4),
            where they are, ``(x0, y0, x1, y1)`` in pixels of the output.
        """
        torch.compiler.cudagraph_mark_step_begin()  # what earlier calls returned is used up
        with self._autocast():
            dense = self.dense(images)
            candidates = [
                self.candidates(dense, n, self.score_threshold) for n in range(len(images))
            ]
        features = dense[0]
        compared = [kept.boxes for kept in candidates]
        if self.nms_on == "masks":
            with self._autocast():
                candidates, compared = with_boxes_of_masks(
                    self.mask_head, features, candidates, replace=self.head.bbox_pred is None
                )
        input_sizes = [tuple(image.shape[-2:]) for image in images]
        frames = zip(input_sizes, output_sizes or input_sizes, strict=True)
        kept_per_image = [
            to_frame(suppress(kept, boxes, self.nms_threshold, self.num_detections), *sizes)
            for kept, boxes, sizes in zip(candidates, compared, frames, strict=True)
        ]
        detections = [
            {"boxes": kept.boxes, "scores": kept.scores, "labels": kept.labels}
            for kept in kept_per_image
        ]
        if self.mask_head is not None:
            groups, positions = group_windows(kept_per_image)
            with self._autocast():
                logits_per_group = self.mask_head.one_by_one(features, groups)
                masks = ungroup_masks(logits_per_group, positions, kept_per_image)
            for detection, kept, masks_of_image in zip(
                detections, kept_per_image, masks, strict=True
            ):
                detection.update(windows=kept.windows, window_masks=masks_of_image)
        return detections

    def candidates(
        self,
        dense: tuple[list[Tensor], list[Tensor], list[Tensor] | None],
        n: int,
        score_threshold: float,
    ) -> Kept:
        """The candidates for NMS in the n-th image of what `dense` returns."""
        features, logits, deltas = (levels and [x[n : n + 1] for x in levels] for levels in dense)

        def deltas_at(level: int, *place: Tensor) -> Tensor:
            return self._deltas_at(features, deltas, level, (torch.zeros_like(place[0]), *place))

        return find_candidates(
            [x[0] for x in logits],
            None if self.head.bbox_pred is None else deltas_at,
            self.windows,
            box_weights=self.box_weights,
            score_threshold=score_threshold,
            num_candidates=self.num_candidates,
        )

    def _autocast(self) -> AbstractContextManager:
        """The precision of inference; autocast of whoever calls goes on where none is set."""
        device, dtype = self.device.type, self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(device, dtype)
