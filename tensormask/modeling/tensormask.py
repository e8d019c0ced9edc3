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
from contextlib import nullcontext
from inspect import Parameter, signature
from typing import Any, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from tensormask.layers.plain import is_plain
from tensormask.modeling.candidates import Candidates
from tensormask.modeling.criterion import (
    Criterion,
    CriterionOptions,
    Normalizer,
    foreground_normalizer,
)
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.inference import (
    find_detections,
    masks_at_windows,
    paste_detection,
    rescale_and_clip,
)
from tensormask.modeling.inputs import (
    SIZE_DIVISOR,
    batch_images,
    check_length,
    checked_target,
    size_of,
)
from tensormask.modeling.inspect import Inspection
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.parts import as_levels, build_parts, check_model
from tensormask.modeling.sampling import sampled_outputs
from tensormask.modeling.sparse import Finest, find_sparsely, finds_sparsely
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name

T = TypeVar("T")


class TensorMask(nn.Module):
    """The whole model. `TensorMask.build` makes it with its parts.

    Args:
        backbone: from normalized images (N, 3, H, W) to a list or dict of feature maps, fine to
            coarse. Its attributes ``out_channels`` and ``strides`` have a number for each of them;
            strides are consecutive powers of 2.
        fpn: from the list of these maps to the list of the pyramid's.
        head, mask_head: at the windows. Without a ``mask_head`` (None), detections have no masks.
            Without a box head in ``head``, they have the boxes of their masks.
        windows: geometry of the sliding windows, with one level per level of the pyramid.
        num_classes: classes without background, those of ``head``.
        pixel_mean, pixel_std: per channel, on the scale 0..255, in the order of ``channel_order``.
        channel_order: "RGB" or "BGR", the order that the backbone's weights expect. Images are
            always given as RGB.
        size_divisor: images are padded to multiples of this many pixels, itself a multiple of 32.
            Larger values give fewer input sizes, each of which a compiled model compiles.
        channels_last: convolve in that memory format.
        autocast_dtype: dtype of `torch.autocast` in inference, bfloat16 or float16; None for the
            dtype of the weights.
        score_threshold, num_candidates: see `inference.find_candidates`.
        nms_on: what NMS compares, the regressed "boxes" or the boxes of the "masks". The latter
            computes the masks of all candidates.
        nms_threshold: IoU above which two boxes of a class are one object; the best remains.
        class_agnostic_nms: whether two boxes of different classes can be one object, too.
        num_detections: the maximum per image.
        query_sample: share of the finest level's blocks of background whose class loss is computed
            in a training step, see `sampling`; 0 for all of them. It needs a query, and a norm of
            the class tower that is local.
        sum_over_ranks: see `criterion.foreground_normalizer`; needed in distributed training.
        criterion: the options of `Criterion`, such as ``assigner``, ``cls_loss``, ``box_loss``,
            ``mask_loss`` and their weights.

    Raises:
        UserError: an option is invalid, needs a part that is missing, or two parts contradict each
            other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        head: ClassBoxHead,
        mask_head: MaskHead | None,
        windows: Windows,
        *,
        num_classes: int | None = None,
        pixel_mean: tuple[float, ...] = (103.53, 116.28, 123.675),
        pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0),
        channel_order: str = "BGR",
        size_divisor: int = SIZE_DIVISOR,
        channels_last: bool = False,
        autocast_dtype: torch.dtype | None = None,
        score_threshold: float = 0.05,
        num_candidates: int = 6000,
        nms_on: str = "boxes",
        nms_threshold: float = 0.5,
        class_agnostic_nms: bool = False,
        num_detections: int = 100,
        query_sample: float = 0.0,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        **criterion: Unpack[CriterionOptions],
    ) -> None:
        super().__init__()
        self.backbone, self.fpn, self.head, self.mask_head = backbone, fpn, head, mask_head
        self.windows, self.criterion = windows, Criterion(windows, **criterion)
        self.num_classes = head.num_classes if num_classes is None else num_classes
        self.channel_order, self.size_divisor = channel_order, size_divisor
        self.channels_last, self.autocast_dtype = channels_last, autocast_dtype
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.num_candidates, self.num_detections = num_candidates, num_detections
        self.nms_on, self.class_agnostic_nms = nms_on, class_agnostic_nms
        self.sum_over_ranks, self.query_sample = sum_over_ranks, query_sample
        check_model(self)
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    pixel_mean: Tensor
    pixel_std: Tensor

    @classmethod
    def build(cls, **options: Any) -> "TensorMask":
        """Build a model with its parts, on the CPU, with random weights.

        Args:
            options: those of `parts.build_parts`, such as ``depth``, ``num_classes``, ``head``,
                ``backbone`` and ``windows``, and those of `TensorMask` that are no parts. The
                defaults are the paper's R-50 with FPN and the tensor bipyramid.

        Raises:
            UserError: an option is unknown or invalid, or contradicts another.

        Example:
            >>> model = TensorMask.build(depth=18, num_classes=3, head="simple_aligned")
            >>> model.num_classes, model.windows.mask_sizes
            (3, [11, 15])
        """
        of_parts = signature(build_parts).parameters
        own = [*signature(cls).parameters.values(), *signature(TensorMask).parameters.values()]
        names = [parameter.name for parameter in own if parameter.kind is Parameter.KEYWORD_ONLY]
        known = dict.fromkeys([*of_parts, *names, *CriterionOptions.__annotations__])
        for name in options.keys() - known:
            raise UserError(unknown_name("an option of a model", name, known))
        parts = build_parts(**{name: options.pop(name) for name in of_parts if name in options})
        return cls(*parts, **options)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
        *,
        normalizer: Normalizer | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in train mode, detections in eval mode.

        In distributed training (``sum_over_ranks``), a call in train mode waits for all ranks,
        because it counts the positive windows of all. For losses on one rank alone, such as those
        of a validation set, pass a ``normalizer``: ``lambda num_positive: max(1, num_positive)``.

        Args:
            images: per image Tensor[3, height, width], RGB, uint8 in 0..255 or floating in 0..1, of
                any sizes. Gradients flow to floating ones.
            targets: in train mode, per image ``boxes`` (K, 4) float ``(x0, y0, x1, y1)`` in
                pixels, ``labels`` (K,) int64 from 0, ``masks`` (K, height, width) bool, uint8, or
                floating with the object where it is above 0.5; K may be 0. A model without a mask
                head needs no masks.
            output_sizes: in eval mode, per image the ``(height, width)`` of its results; by default
                that of the image.
            normalizer: in train mode, the divisor of the losses, or a function that returns it for
                the number of positive windows; by default `criterion.foreground_normalizer`.

        Returns:
            - in train mode ``{"loss_cls", "loss_box_reg", "loss_mask"}``, scalars, per positive
              window of the batch (`criterion.foreground_normalizer`);
            - in eval mode per image ``boxes`` (K, 4), ``scores`` (K,), ``labels`` (K,) and
              ``masks`` (K, height, width) bool, best first.

            ``loss_mask`` and ``masks`` need a mask head, ``loss_box_reg`` needs a box head.
            ``dice_loss_weight`` adds a ``loss_dice``, ``mask_iou`` a ``loss_mask_iou``, and a query
            a ``loss_query``.

        Raises:
            UserError: an image or target has an invalid shape, dtype or range, their numbers
                differ, or targets are missing in train mode.

        Example:
            >>> from tensormask import build_model, model_zoo
            >>> model = build_model(model_zoo.get_config("tensormask_R_50_FPN_1x")).eval()
            >>> sorted(model([torch.rand(3, 64, 64)])[0])
            ['boxes', 'labels', 'masks', 'scores']
        """
        if not self.training:
            detections = self.detect(images, output_sizes)
            return list(map(paste_detection, detections, output_sizes or map(size_of, images)))
        if targets is None:
            raise UserError("train mode needs targets: pass them, or call model.eval()")
        check_length("targets", targets, images)
        if self._is_compiled():  # `detect` does it, and then PyTorch expects it of every call
            torch.compiler.cudagraph_mark_step_begin()
        # A GPU computes while the host checks the targets; a sample needs them.
        dense = None if self.query_sample else self.dense(images)
        targets = [self._checked(*pair) for pair in zip(targets, images, strict=True)]
        if dense is None:
            dense = self.dense(images, targets)
        if normalizer is None:
            normalizer = functools.partial(
                foreground_normalizer, device=self.device, sum_over_ranks=self.sum_over_ranks
            )
        return self.criterion(dense, targets, self.head, self.mask_head, normalizer)

    def dense(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> DenseOutputs:
        """Run the backbone, the pyramid, and the class and box head.

        With the targets of `forward` and ``query_sample``, on a sample of the finest level.
        """
        batch = self.preprocess(images)
        features = as_levels(self, "backbone", self.backbone(batch), batch)
        features = as_levels(self, "fpn", self.fpn(features), batch)
        if targets is not None and self.query_sample and not self._is_compiled():
            grids = [size_of(x) for x in features]
            assignment = self.criterion.assign([t["boxes"] for t in targets], grids)
            dense = sampled_outputs(self.head, features, assignment, self.query_sample)
            if dense is not None:
                return dense
        # A compiled head does the same work for every image: best the deltas of all windows. So
        # does a GPU in inference: the host would wait for the windows of the candidates.
        on_gpu = batch.device.type != "cpu"
        dense_boxes = self._is_compiled() or (on_gpu and not self.training)
        return DenseOutputs(features, *self.head(features, dense_boxes=dense_boxes))

    def _is_compiled(self) -> bool:
        return self.head._compiled_call_impl is not None

    def preprocess(self, images: list[Tensor]) -> Tensor:
        """Return the normalized batch (N, 3, height, width), padded with 0 at right and bottom.

        It is computed in at least float32, and has the dtype of the model.
        """
        return batch_images(
            images,
            self.pixel_mean,
            self.pixel_std,
            bgr=self.channel_order == "BGR",
            divisor=self.size_divisor,
            channels_last=self.channels_last,
        )

    def _checked(self, target: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
        with_masks = self.mask_head is not None
        return checked_target(target, image, self.num_classes, self.device, with_masks=with_masks)

    def inspect(
        self,
        image: Tensor,
        target: dict[str, Tensor] | None = None,
        *,
        score_threshold: float | None = None,
    ) -> Inspection:
        """Return what the model makes of an image: the outputs of all windows, and detections.

        They are computed in the dtype of the weights, without the autocast of `detect`.

        Args:
            image, target: as of `forward`, one each. With a target, its objects are assigned to
                windows.
            score_threshold: of the detections; None for the model's.

        Raises:
            UserError: as of `forward` and `detect`.

        Example:
            >>> model = TensorMask.build(depth=18, num_classes=3).eval()
            >>> inspection = model.inspect(torch.zeros(3, 64, 96))
            >>> inspection.boxes(0).shape  # of the windows of 2 sizes on p2
            torch.Size([2, 16, 24, 4])
        """
        dense = self.dense([image])
        threshold = _first(score_threshold, self.score_threshold)
        size = [size_of(image)]
        (detections,) = rescale_and_clip(self.find_detections(dense, threshold), size, size)
        assignment = None
        if target is not None:
            checked, grids = self._checked(target, image), list(map(size_of, dense.logits))
            assignment = self.criterion.assign([checked["boxes"]], grids)
        return Inspection(self, dense, threshold, detections, assignment)

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
        if output_sizes is not None:
            check_length("output_sizes", output_sizes, images)
        dtype = self.autocast_dtype  # without one, the caller's autocast stays active
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            dense, finest = self._detection_outputs(images)
            options = score_threshold, num_detections, classes, class_agnostic_nms
            detections = self.find_detections(dense, *options)
            sizes = [size_of(image) for image in images]
            detections = rescale_and_clip(detections, sizes, output_sizes or sizes)
            results: list[dict[str, Tensor | list[Tensor]]] = [
                {"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in detections
            ]
            if self.mask_head is not None:
                masks = masks_at_windows(self.mask_head, dense.features, detections, finest)
                for result, d, window_masks in zip(results, detections, masks, strict=True):
                    result.update(windows=d.windows, window_masks=window_masks)
        return results

    def _detection_outputs(self, images: list[Tensor]) -> tuple[DenseOutputs, Finest | None]:
        """Return the outputs of `dense`, with a query those of `sparse.find_sparsely`."""
        if not finds_sparsely(self.fpn, self.head):
            return self.dense(images), None
        batch = self.preprocess(images)
        features = as_levels(self, "backbone", self.backbone(batch), batch)
        on_gpu, whole = batch.device.type != "cpu", False
        if self.mask_head is not None:  # else it reads the finest features of all locations
            by_boxes = self.nms_on == "boxes" and is_plain(self.mask_head, MaskHead)
            whole = not (by_boxes and self.mask_head.bipyramid)
        fpn, head = cast(FPN, self.fpn), self.head
        return find_sparsely(fpn, head, features, dense_boxes=on_gpu, whole=whole)

    def find_detections(
        self,
        dense: DenseOutputs,
        score_threshold: float | None = None,
        num_detections: int | None = None,
        classes: Sequence[int] | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[Candidates]:
        """Return per image what `detect` detects with these options, in pixels of the input.

        Those with score -1 are no detections.
        """
        return find_detections(
            dense,
            self.head,
            self.mask_head,
            self.windows,
            box_weights=self.criterion.box_weights,
            score_threshold=_first(score_threshold, self.score_threshold),
            num_candidates=self.num_candidates,
            classes=classes,
            nms_on=self.nms_on,
            nms_threshold=self.nms_threshold,
            class_agnostic_nms=_first(class_agnostic_nms, self.class_agnostic_nms),
            num_detections=_first(num_detections, self.num_detections),
        )


def _first(given: T | None, default: T) -> T:
    return default if given is None else given
