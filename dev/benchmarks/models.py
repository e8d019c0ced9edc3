"""The models that are compared, and weights with which both find as much as on a photograph.

Weights are random: what a model costs follows from its shapes, and from how many windows and boxes
are left for its later steps. Those are set here, each model with its own thresholds:

- Activations stay near one, as after training: no overflow in half precision, no denormals.
- TensorMask finds its detections on the levels where objects of COCO's sizes are, 40 % of them
  small, 35 % medium and 25 % large (`objects_per_level`). The score of a window is a random field
  on its level. The output of the pyramid is scaled for each level so that the right number of
  windows lies above one score, the same for all levels. As many candidates as it takes at most,
  6000, pass its score threshold: the dearest case for it.
- Mask R-CNN's proposals and detections come from all levels of its pyramid, which is scaled as
  well, and 500 candidates are above its score threshold.
- In training, Mask R-CNN's sampled regions count as positive from its own IoU of 0.5 on. Random
  proposals seldom meet an object: its mask head has less work than in a trained model, of whose 512
  regions up to 128 may be positive. At an IoU of 0.1 random ones are as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d, batched_nms, nms

from . import bare

bare.prepare()

from tensormask.config import CfgNode  # noqa: E402
from tensormask.modeling import TensorMask, build_model  # noqa: E402

OURS, THEIRS = "tensormask", "torchvision"
# COCO's small, medium and large objects: their share, and the longer side in pixels from where to
# where, in an image whose shorter side is 480 px.
_OBJECTS = ((0.40, 8, 32), (0.35, 32, 96), (0.25, 96, 640))
_SHORTER_SIDE = 480
_CANDIDATES_OF_MASK_RCNN = 500
# Proposals are parted by size, to make their scores comparable.
_GROUPS_OF_SIZES = 8
# The score of the last detection.
_LAST_SCORE = 0.5
POSITIVE_IOU = 0.5
_TOO_FEW = "NMS leaves too few windows of this image: give a larger --size or fewer --detections"
# Boxes stay near the windows and anchors that they come from.
_BOX_GAIN = 0.02


def build_tensormask(cfg: CfgNode, seed: int = 0) -> TensorMask:
    """Our model, in eval mode, with seeded weights."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    steady_activations(model)
    with torch.no_grad():
        # Images are not divided by their deviation.
        model.backbone.stem.conv1.weight /= 60 / model.pixel_std.mean().item()
        if model.head.bbox_pred is not None:
            model.head.bbox_pred.weight *= _BOX_GAIN
    return model.eval()


def build_mask_rcnn(
    size: tuple[int, int],
    detections: int,
    device: str,
    *,
    channels_last: bool = False,
    positive_iou: float = POSITIVE_IOU,
    seed: int = 0,
) -> MaskRCNN:
    """torchvision's Mask R-CNN for images of one size (height, width), in eval mode.

    It is as with pretrained weights: frozen batch norms, stem and layer1 not trained.
    """
    torch.manual_seed(seed)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        box_detections_per_img=detections,
        box_fg_iou_thresh=positive_iou,
        box_bg_iou_thresh=positive_iou,
    )
    set_image_size(model, size)
    freeze_batch_norms(model)
    for name in ("conv1", "layer1"):
        model.backbone.body[name].requires_grad_(False)
    steady_activations(model)
    with torch.no_grad():
        for layer in (model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred):
            layer.weight *= _BOX_GAIN
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format).eval()


def set_image_size(model: MaskRCNN, size: tuple[int, int]) -> None:
    """Let images of a size (height, width) keep it."""
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)


def freeze_batch_norms(model: nn.Module) -> None:
    """Replace every batch norm by one of constants, which gives the same in eval mode."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight)
                frozen.load_state_dict(norm.state_dict())
                setattr(module, name, frozen)


def steady_activations(model: nn.Module) -> None:
    """Draw weights of convolutions that keep the signal; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.3)  # the sum over blocks does not grow


def make_image(size: tuple[int, int], seed: int = 0) -> Tensor:
    """A seeded uint8 image (3, height, width): noise of all scales, the coarse ones strongest."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, *size)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        total += F.interpolate(noise, size, mode="bilinear") / cells**0.5
    return (128 + 50 * total[0]).clamp(0, 255).byte()


def objects_per_level(largest: Sequence[float], size: tuple[int, int], count: int) -> list[int]:
    """How many of `count` objects each level takes if they have the sizes of COCO's.

    Args:
        largest: the longer side in pixels up to which a level takes objects, fine to coarse; the
            coarsest takes all the rest.
        size: height and width of the image in pixels.
    """
    scale = min(size) / _SHORTER_SIDE
    counts = [0] * len(largest)
    for i in range(count):
        side = scale * _side_of_object((i + 0.5) / count)
        fitting = [level for level, limit in enumerate(largest[:-1]) if side <= limit]
        counts[fitting[0] if fitting else -1] += 1
    return counts


def _side_of_object(rank: float) -> float:
    """The longer side of the object of a rank, 0..1 from the smallest to the largest, in pixels."""
    longest = 0.0
    for share, shortest, longest in _OBJECTS:
        if rank < share:
            return shortest * (longest / shortest) ** (rank / share)
        rank -= share
    return longest


@torch.no_grad()
def spread_detections(model: TensorMask, image: Tensor) -> list[int]:
    """Make a model find its detections on an image, on levels as `objects_per_level` says.

    Args:
        model: of `build_tensormask`.
        image: uint8 (3, H, W).

    Returns:
        The number of detections per level that are meant.

    Raises:
        ValueError: the image has not enough windows.
    """
    features = model.fpn(model.backbone(model.preprocess([image])))
    _centre(model.head.cls_score, [model.head.cls_subnet(x) for x in features])
    logits_per_level = [x[0] for x in model.head(features)[0]]
    largest = [max(sides) for sides in model.windows.sizes]
    meant = objects_per_level(largest, tuple(image.shape[-2:]), model.num_detections)
    found = [
        _after_nms(logits, level, model, max(meant))
        for level, logits in enumerate(logits_per_level)
    ]
    # A level of a few windows may be no more than its mean, which is taken away.
    found = [best[best > 0.01 * found[0][0]] for best in found]
    for level in reversed(range(1, len(meant))):  # what a level cannot hold goes to a finer one
        excess = max(0, meant[level] - len(found[level]))
        meant[level], meant[level - 1] = meant[level] - excess, meant[level - 1] + excess
    if meant[0] > len(found[0]):
        raise ValueError(_TOO_FEW)
    # The last that is wanted has the value 1 on each level, and what comes after it less.
    factors = [
        1 / best[count - 1].item() if count else 0.9 / max([1.0, *best[:1].tolist()])
        for best, count in zip(found, meant, strict=True)
    ]
    _scale_levels(model, factors)
    values = torch.cat([f * x.flatten() for f, x in zip(factors, logits_per_level, strict=True)])
    rank = min(model.num_candidates, len(values) // 4)
    lowest = values.topk(rank).values[-1].item()
    if lowest >= 1:
        raise ValueError(_TOO_FEW)
    threshold, last = (math.log(p / (1 - p)) for p in (model.score_threshold, _LAST_SCORE))
    gain = (last - threshold) / (1 - lowest)
    model.head.cls_score.weight *= gain
    model.head.cls_score.bias.fill_(last - gain)
    return meant


@torch.no_grad()
def fill_detections(model: MaskRCNN, image: Tensor) -> None:
    """Make a Mask R-CNN have enough candidates on an image, floating (3, H, W) in 0..1."""
    _spread_proposals(model, image)
    for _ in range(2):
        _even_out_levels(model, *_proposals(model, image))
    boxes, features = _proposals(model, image)
    predictor, threshold = model.roi_heads.box_predictor.cls_score, model.roi_heads.score_thresh
    by_size = features[(boxes[:, 2] - boxes[:, 0]).argsort()]
    _centre(predictor, list(by_size.chunk(_GROUPS_OF_SIZES)))
    nn.init.zeros_(predictor.bias)
    logits = predictor(features)
    gain = 6 / logits[:, 1:].std()
    predictor.weight *= gain
    predictor.weight[0] = 0
    logits = logits * gain
    # The background's value is found by halves: fewer pass, the higher it is.
    low, high = -100.0, 100.0
    for _ in range(30):
        logits[:, 0] = middle = (low + high) / 2
        passing = (logits.softmax(1)[:, 1:] > threshold).sum().item()
        low, high = (middle, high) if passing > _CANDIDATES_OF_MASK_RCNN else (low, middle)
    predictor.bias[0] = low


def _spread_proposals(model: MaskRCNN, image: Tensor) -> None:
    """Scale the outputs of the pyramid so that proposals come from all levels."""
    batch = model.transform([image])[0]
    features = list(model.backbone(batch.tensors).values())
    logits_per_level = [x.permute(0, 2, 3, 1).flatten() for x in model.rpn.head(features)[0]]
    anchors = model.rpn.anchor_generator(batch, features)[0].split(
        [len(x) for x in logits_per_level]
    )
    largest = [2**0.5 * 32 * 2**level for level in range(len(features))]
    counts = objects_per_level(largest, batch.image_sizes[0], model.rpn.post_nms_top_n())
    factors = []
    for logits, boxes, count in zip(logits_per_level, anchors, counts, strict=True):
        best, index = logits.topk(min(len(logits), model.rpn.pre_nms_top_n()))
        best = best[nms(boxes[index], best, model.rpn.nms_thresh)]
        factors.append(1 / best[max(0, min(count, len(best)) - 1)].item())
    factors[-2] = min(factors[-2:])  # the coarsest level is the one before it, subsampled
    for block, factor in zip(model.backbone.fpn.layer_blocks, factors[:-1], strict=True):
        block[0].weight *= factor


def _proposals(model: MaskRCNN, image: Tensor) -> tuple[Tensor, Tensor]:
    """The proposals (K, 4) in an image, and what the box head makes of them, (K, C)."""
    seen: dict[str, Tensor] = {}
    roi = model.roi_heads
    handles = [
        roi.box_roi_pool.register_forward_pre_hook(lambda _, x: seen.update(boxes=x[1][0])),
        roi.box_predictor.register_forward_pre_hook(lambda _, x: seen.update(features=x[0])),
    ]
    model([image])
    for handle in handles:
        handle.remove()
    return seen["boxes"], seen["features"]


def _even_out_levels(model: MaskRCNN, boxes: Tensor, features: Tensor) -> None:
    """Scale the outputs of the pyramid so that the scores of each level vary as much."""
    levels = model.roi_heads.box_roi_pool.map_levels([boxes])
    for level, block in enumerate(model.backbone.fpn.layer_blocks):
        of_level = features[levels == level]
        if len(of_level) > 1:
            block[0].weight /= (of_level - of_level.mean(0)).std()


def _centre(layer: nn.Module, inputs: list[Tensor]) -> None:
    """Take from a layer's weights what answers to the mean of each of its inputs (N, C, ...).

    Random features are much the same everywhere. Without this one class would win all places of a
    level.
    """
    means = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in inputs], dim=1)
    directions = torch.linalg.qr(means).Q
    weight = layer.weight.view(*layer.weight.shape[:2], -1)
    weight -= torch.einsum("oik,id,jd->ojk", weight, directions, directions)


def _after_nms(logits: Tensor, level: int, model: TensorMask, count: int) -> Tensor:
    """The best logits of a level (C, H, W) that are left by NMS of its windows, in order."""
    best, index = logits.flatten().topk(min(logits.numel(), 100 * count + 1000))
    channel, y, x = torch.unravel_index(index, logits.shape)
    size, label = channel // model.num_classes, channel % model.num_classes
    boxes = model.windows.boxes(torch.full_like(size, level), size, y, x)
    return best[batched_nms(boxes, best, label, model.nms_threshold)]


def _scale_levels(model: TensorMask, factors: list[float]) -> None:
    """Multiply the outputs of the pyramid; p7 is made from p6, whose factor it has already."""
    for i, (number, factor) in enumerate(zip(model.windows.levels, factors, strict=True)):
        if number <= 5:
            output = model.fpn.output[f"p{number}"]
            if not isinstance(output, nn.Conv2d):
                raise ValueError("MODEL.FPN.NORM must be empty: a norm would undo the scales")
        else:
            output = getattr(model.fpn, f"p{number}")
            if number == 7:
                factor /= factors[i - 1]
        output.weight *= factor
