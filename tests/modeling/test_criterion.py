"""`Criterion` with the options of the losses: their weights, batches without objects, training."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import box_iou

from tensormask.modeling import (
    TensorMask,
    Windows,
    box_loss,
    decode_boxes,
    quality_focal_loss,
    varifocal_loss,
)

BOXES = [[10.0, 12.0, 40.0, 44.0], [44.0, 6.0, 60.0, 30.0]]
SMALL = {"num_classes": 3, "fpn_channels": 16, "num_convs": 1, "init": "he", "cls_channels": 16}
SMALL |= {"bbox_channels": 16, "mask_channels": 16, "windows": Windows.of_strides([4, 8])}

# Each option once.
OPTIONS: list[dict[str, Any]] = [
    {"quality_loss": quality_focal_loss, "dice_loss_weight": 1.0},
    {"quality_loss": varifocal_loss, "mask_iou": True},
]


class Stem(nn.Module):
    """A backbone of one convolution."""

    strides, out_channels = (4,), (16,)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x).relu()]


def build(**options: Any) -> TensorMask:
    torch.manual_seed(0)
    return TensorMask.build(backbone=Stem(), **SMALL, pixel_std=(57.0,) * 3, **options).train()


def losses_of(model: TensorMask, num_objects: int = 2) -> dict[str, Tensor]:
    return model([tiny.make_image(64, 64)], [tiny.target(64, 64, BOXES[:num_objects])])


@pytest.mark.parametrize("options", OPTIONS)
def test_options_without_objects(options: dict) -> None:
    """The losses are finite, and every parameter has a gradient; those of the boxes are 0."""
    model = build(**options)
    losses = losses_of(model, num_objects=0)
    own = {"loss_dice"} if "dice_loss_weight" in options else {"loss_mask_iou"}
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_mask"} | own
    assert all(losses[key] == 0 for key in losses.keys() - {"loss_cls"})
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_options_reduce_their_losses(options: dict) -> None:
    model = build(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        losses = losses_of(model)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({key: loss.item() for key, loss in losses.items()})
    assert all(history[-1][key] < 0.8 * history[0][key] for key in history[0])


def test_weights_of_the_losses() -> None:
    names = ("box_loss_weight", "mask_loss_weight", "dice_loss_weight", "mask_iou_loss_weight")
    options = dict.fromkeys(names, 1.0)
    once, weighted = (
        losses_of(build(mask_iou=True, **{key: factor * value for key, value in options.items()}))
        for factor in (1, 3)
    )
    for key in ("loss_box_reg", "loss_mask", "loss_dice", "loss_mask_iou"):
        assert_close(weighted[key], 3 * once[key])
    assert torch.equal(weighted["loss_cls"], once["loss_cls"])


def test_keys_of_the_losses() -> None:
    head = "MODEL.TENSOR_MASK."
    opts = [head + "BBOX_REG_LOSS_WEIGHT", 0.5, head + "DICE_LOSS_WEIGHT", 0.25]
    opts += [head + "CLS_LOSS", "varifocal", head + "MASK_IOU_ON", True]
    opts += [head + "MASK_IOU_LOSS_WEIGHT", 0.75]
    model = tiny.build(opts=opts)
    assert model.head.mask_iou
    criterion = model.criterion
    assert criterion.mask_iou_loss_weight == 0.75
    assert criterion.box_loss_weight == 0.5
    assert criterion.dice_loss_weight == 0.25
    assert criterion.quality_loss is varifocal_loss


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["CLS_LOSS", "focalstar"], r"CLS_LOSS.*nearest name is 'focal_star'"),
        (["CLS_LOSS", "quality", "BOX_ON", False, "NMS_ON", "masks"], "needs boxes"),
        (["MASK_IOU_ON", True, "BOX_ON", False, "NMS_ON", "masks"], "needs the box head"),
    ],
)
def test_invalid_keys(opts: list, message: str) -> None:
    opts = [f"MODEL.TENSOR_MASK.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)]
    with pytest.raises(ValueError, match=message):
        tiny.build(opts=opts)


def test_qualities_are_the_ious_of_the_predicted_boxes() -> None:
    """Per level, detached, in the order of the positive logits; the box loss stays as it was."""
    seen: list[tuple] = []

    def quality_loss(*inputs: Any) -> Tensor:
        seen.append(inputs)
        return quality_focal_loss(*inputs)

    def own_box_loss(deltas: Tensor, target_deltas: Tensor, windows: Tensor) -> Tensor:
        boxes, targets = (decode_boxes(x, windows) for x in (deltas, target_deltas))
        seen.append(box_iou(boxes, targets).diagonal())
        return box_loss(deltas, target_deltas)

    losses = losses_of(build(quality_loss=quality_loss, box_loss=own_box_loss))
    ious, (logits, positives, per_level) = seen
    assert_close(torch.cat(per_level), ious)
    assert not per_level[0].requires_grad
    assert [len(x) for x in per_level] == [len(index[0]) for index in positives]
    assert len(logits) == len(per_level) == 2
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_mask"]


def test_target_of_the_predicted_ious_is_that_of_the_masks() -> None:
    """Of windows in the order of the box head's outputs, also if a window size has none."""
    model, boxes = build(mask_iou=True), BOXES[:1]
    masks: list[tuple[Tensor, Tensor]] = []
    of_masks = model.criterion.mask_loss

    def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
        masks.append((logits, targets))
        return of_masks(logits, targets)

    model.criterion.mask_loss = mask_loss
    outputs: list[Tensor] = []
    outputs_at = model.head.outputs_at
    model.head.outputs_at = lambda *args: outputs.append(outputs_at(*args)) or outputs[-1]
    nn.init.normal_(model.head.iou_pred.weight, std=0.3)
    loss = model([tiny.make_image(64, 64)], [tiny.target(64, 64, boxes)], normalizer=1)
    predicted = torch.cat(outputs)[:, 4].sigmoid()
    ious = torch.stack(
        [
            ((mask > 0) & target).sum() / ((mask > 0) | target).sum()
            for of_group in masks
            for mask, target in zip(*of_group, strict=True)
        ]
    )
    assert predicted.std() > 0.01
    expected = -(ious * predicted.log() + (1 - ious) * (1 - predicted).log()).sum()
    assert_close(loss["loss_mask_iou"], expected)


def test_extreme_ious_of_half_precision_stay_finite() -> None:
    model = build(mask_iou=True)
    nn.init.constant_(model.head.iou_pred.bias, -60000.0)
    with torch.autocast("cpu", torch.float16):
        loss = losses_of(model)["loss_mask_iou"]
    loss.backward()
    assert loss.isfinite()
    assert model.head.iou_pred.bias.grad.isfinite().all()


def test_mask_iou_needs_a_mask_head() -> None:
    with pytest.raises(ValueError, match="no mask head"):
        build(mask_iou=True, head=None)
