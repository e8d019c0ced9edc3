"""Parts of one's own: a model in one call, backbones, losses, assignments, and misfits."""

import functools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny import build, get_cfg, make_image, target, with_detections
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import generalized_box_iou_loss

from tensormask.modeling import (
    FPN,
    Assignment,
    ClassBoxHead,
    MaskHead,
    ResNet,
    TensorMask,
    Windows,
    assign,
    build_model,
    decode_boxes,
    focal_loss_star,
    mask_loss,
)

BOXES = [[20.0, 30.0, 60.0, 70.0], [70.0, 10.0, 90.0, 50.0]]
SMALL = {"num_classes": 3, "fpn_channels": 16, "num_convs": 1, "init": "he"}
SMALL |= {"cls_channels": 16, "bbox_channels": 16, "mask_channels": 16}


def losses_of(model: TensorMask, **options) -> dict[str, Tensor]:
    return model.train()([make_image(96, 96)], [target(96, 96, BOXES)], **options)


def assert_works(model: TensorMask) -> None:
    losses = losses_of(model)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.inference_mode():
        (detection,) = with_detections(model)([make_image(64, 96)])
    assert len(detection["scores"]) > 0
    assert detection["masks"].shape[1:] == (64, 96)


# ---- one call ----


def test_one_call_builds_the_model_of_the_config() -> None:
    options = {"depth": 18, "norm": "GN", "freeze_at": 0, "pixel_std": (57.0, 57.0, 57.0)}
    torch.manual_seed(0)
    model, of_config = TensorMask.build(**SMALL, **options), build()
    state = of_config.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = losses_of(of_config)
    assert all(torch.equal(loss, expected[name]) for name, loss in losses_of(model).items())


def test_the_defaults_are_the_published_recipe() -> None:
    with torch.device("meta"):
        model = TensorMask.build()
    from tensormask import model_zoo

    cfg = model_zoo.get_config("tensormask_R_50_FPN_1x")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        published = build_model(cfg)
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert model.windows == published.windows
    names = ("score_threshold", "nms_threshold", "num_candidates", "num_detections")
    names += ("channel_order", "size_divisor", "nms_on", "class_agnostic_nms")
    assert all(getattr(model, name) == getattr(published, name) for name in names)
    assert model.fpn.fuse == published.fpn.fuse
    assert model.criterion.box_weights == published.criterion.box_weights
    assert model.criterion.mask_loss_weight == published.criterion.mask_loss_weight
    for name in ("cls_loss", "mask_loss"):  # default arguments
        loss = getattr(published.criterion, name)
        assert all(loss.func.__kwdefaults__[key] == value for key, value in loss.keywords.items())


@pytest.mark.parametrize("head", ["simple_natural", "simple_aligned", "upscale_aligned", None])
def test_heads_by_name(head: str | None) -> None:
    options = {"upscale": 5.0, "windows": Windows.of_strides([4, 8, 16], [15])}
    options = options if head == "upscale_aligned" else {}
    model = TensorMask.build(depth=18, head=head, **SMALL, **options)
    assert (model.mask_head is None) == (head is None)
    losses = model.train()([make_image(64, 64)], [target(64, 64, BOXES[:1])])
    assert ("loss_mask" in losses) == (head is not None)


# ---- backbones ----


class OwnBackbone(nn.Module):
    """A convolution of stride 2 per level."""

    def __init__(self, strides: Sequence[int], returns: Callable = list) -> None:
        super().__init__()
        self.strides, self.out_channels, self.returns = strides, [8 + i for i in strides], returns
        channels, steps = [3, *self.out_channels], [int(strides[0]), 2, 2]
        sizes = zip(channels, self.out_channels, steps, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, step, 1) for i, o, step in sizes)

    def forward(self, x: Tensor) -> object:
        return self.returns([x := conv(x).relu() for conv in self.convs])


@pytest.mark.parametrize(
    "strides, returns",
    [
        ([4, 8], lambda maps: maps),
        ([8, 16, 32], lambda maps: dict(enumerate(maps))),
        (np.array([2, 4, 8]), tuple),
        ([16], lambda maps: maps[0]),
    ],
)
def test_own_backbones(strides, returns) -> None:
    model = TensorMask.build(backbone=OwnBackbone(strides, returns), **SMALL)
    assert list(model.windows.strides) == [*strides, strides[-1] * 2, strides[-1] * 4]
    assert_works(model)


def test_backbone_of_torchvision() -> None:
    nodes = {f"layer{i}": f"{i}" for i in range(1, 5)}
    backbone = create_feature_extractor(resnet18(), nodes)
    backbone.out_channels, backbone.strides = [64, 128, 256, 512], [4, 8, 16, 32]
    assert_works(TensorMask.build(backbone=backbone, **SMALL))


def test_backbone_of_timm() -> None:
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    backbone.out_channels = backbone.feature_info.channels()
    backbone.strides = backbone.feature_info.reduction()
    assert_works(TensorMask.build(backbone=backbone, **SMALL))


# ---- losses and assignments ----


def giou_loss(deltas: Tensor, target_deltas: Tensor, windows: Tensor) -> Tensor:
    boxes, wanted = (decode_boxes(d, windows) for d in (deltas, target_deltas))
    return generalized_box_iou_loss(boxes, wanted, reduction="sum")


class Weighted(nn.Module):
    """A loss with a parameter, which is a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.weight * mask_loss(logits, targets)


def test_own_losses() -> None:
    expected = losses_of(build())
    seen: list[tuple[Tensor, ...]] = []

    def own_box_loss(*inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return giou_loss(*inputs)

    model = TensorMask(
        *parts_of(build()),
        pixel_std=(57.0, 57.0, 57.0),
        cls_loss=lambda logits, positives: 2 * focal_loss_star(logits, positives),
        box_loss=own_box_loss,
        mask_loss=Weighted(),
    )
    assert "criterion.mask_loss.weight" in dict(model.named_parameters())
    losses = losses_of(model)
    assert_close(losses["loss_cls"], 2 * expected["loss_cls"])
    assert_close(losses["loss_mask"], 3 * expected["loss_mask"])
    ((deltas, target_deltas, windows),) = seen
    assert deltas.shape == target_deltas.shape == windows.shape
    truth = torch.tensor(BOXES)
    distance = (decode_boxes(target_deltas, windows)[:, None] - truth).abs().amax(2).amin(1)
    assert distance.max() < 1e-3
    sum(losses.values()).backward()
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0


def parts_of(model: TensorMask) -> tuple:
    return model.backbone, model.fpn, model.head, model.mask_head, model.windows


def test_own_assigner() -> None:
    """Only windows of the finest level: the losses of `assign` with the others left out."""

    def finest(boxes: list[Tensor], windows: Windows, grids: list) -> Assignment:
        assignment = assign(boxes, windows, grids)
        return assignment.select(assignment.level == 0)

    model = TensorMask(*parts_of(build()), assigner=finest, pixel_std=(57.0, 57.0, 57.0))
    counts = []
    model.criterion.register_forward_hook(lambda module, args, losses: counts.append(args[-1]))
    losses = losses_of(model, normalizer=lambda number: counts.append(number) or number)
    whole = assign([torch.tensor(BOXES)], model.windows, model.windows.grids((96, 96)))
    assert 0 < counts[0] == (whole.level == 0).sum() < len(whole.level)
    assert all(loss.isfinite() for loss in losses.values())


def test_windows_outside_of_the_grid_are_refused() -> None:
    def beyond(boxes: list[Tensor], windows: Windows, grids: list) -> Assignment:
        last = torch.tensor([len(grids) - 1])
        height, width = torch.tensor(grids[-1:]).T
        return Assignment.make(windows, 1, last * 0, last * 0, last, last * 0, height - 1, width)

    model = TensorMask(*parts_of(build()), assigner=beyond)
    with pytest.raises(ValueError, match="assigner returned windows outside of the grids"):
        losses_of(model)


def test_assignments_are_sorted_and_counted() -> None:
    windows = Windows.of_strides([4, 8, 16])
    images = [torch.tensor(BOXES), torch.zeros(0, 4), torch.tensor(BOXES[:1])]
    assignment = assign(images, windows, windows.grids((96, 96)))
    order = torch.randperm(len(assignment.y), generator=torch.Generator().manual_seed(0))
    columns = [column[order] for column in assignment[:6]]
    made = Assignment.make(windows, 3, *columns)
    assert made.counts == assignment.counts
    assert torch.equal(made.boxes.sort(0).values, assignment.boxes.sort(0).values)
    assert sorted(zip(*map(Tensor.tolist, made[:6]), strict=True)) == sorted(
        zip(*map(Tensor.tolist, assignment[:6]), strict=True)
    )
    for selected in (made.select(made.level == 1), made.select(torch.tensor([5, 0]))):
        for level, sizes in enumerate(selected.counts):
            for size, per_image in enumerate(sizes):
                for image, count in enumerate(per_image):
                    index = (selected.level, level), (selected.size, size), (selected.image, image)
                    rows = torch.stack([column == value for column, value in index]).all(0)
                    assert count == rows.sum()
        key = selected.level * 100 + selected.size * 10 + selected.image
        assert torch.equal(key, key.sort().values)


def test_normalizer() -> None:
    """It replaces the sum over ranks, which would wait for the others."""

    def unreachable(counts: Tensor) -> Tensor:
        raise AssertionError("a collective")

    model = build_model(get_cfg(), sum_over_ranks=unreachable)
    model.load_state_dict(build().state_dict())
    plain = losses_of(build())
    number = len(assign([torch.tensor(BOXES)], model.windows, model.windows.grids((96, 96))).y)
    for normalizer in (7, lambda given: 7 if given == number else None):
        for name, loss in losses_of(model, normalizer=normalizer).items():
            assert_close(loss * 7, plain[name] * number)


# ---- what a model makes of an image ----


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_inspect(head: str) -> None:
    model = with_detections(build(head))
    image, truth = make_image(64, 96), target(64, 96, BOXES)
    with torch.inference_mode():
        inspection = model.inspect(image, truth, score_threshold=0.2)
        (unpasted,) = model.detect([image], score_threshold=0.2)
        d = inspection.detections
        assert_close(d.boxes, unpasted["boxes"])
        rows = zip(d.level, d.size, d.y, d.x, d.labels, d.scores, strict=True)
        for row, (level, size, y, x, label, score) in enumerate(rows):
            assert_close(inspection.class_scores[level][size, label, y, x], score)
            box = inspection.boxes(level)[size, y, x]
            limit = torch.tensor([96.0, 64.0] * 2)
            assert_close(torch.minimum(box.clamp(min=0), limit), d.boxes[row], rtol=1e-4, atol=1e-3)
        masks = inspection.masks(0, 1)
        assert masks.shape == (16, 24, 15, 15)
    assignment = assign([truth["boxes"]], model.windows, model.windows.grids((64, 96)))
    assert all(map(torch.equal, inspection.assignment[:6], assignment[:6]))
    assert model.inspect(image).assignment is None


# ---- what does not fit ----


def make_parts(**changes) -> tuple:
    windows = changes.get("windows", Windows.of_strides([4, 8, 16, 32]))
    backbone = changes.get("backbone", ResNet(18))
    return (
        backbone,
        changes.get("fpn", FPN([64, 128, 256, 512], 16, levels=(2, 5))),
        changes.get("head", ClassBoxHead(16, 2, 3, cls_channels=16, bbox_channels=16)),
        changes.get("mask_head", MaskHead(16, [11, 15], (4, 8, 16, 32), channels=16)),
        windows,
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fpn": partial(FPN, [64, 128, 256, 512], 16, levels=(3, 6))}, "fpn.strides is .8, 16"),
        ({"fpn": partial(FPN, [64, 128, 256, 511], 16, levels=(2, 5))}, "backbone.out_channels is"),
        ({"fpn": partial(FPN, [64, 128, 256, 512], 8, levels=(2, 5))}, "head.in_channels is 16"),
        ({"head": partial(ClassBoxHead, 16, 1, 3)}, "windows.num_sizes is 2 and head.num_sizes"),
        ({"mask_head": partial(MaskHead, 16, [9, 15], (4, 8, 16, 32))}, "mask_head.mask_sizes is"),
        ({"mask_head": partial(MaskHead, 16, [11, 15], (4, 8))}, "mask_head.strides is .4, 8"),
    ],
)
def test_parts_that_contradict_each_other(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        TensorMask(*make_parts(**{name: make() for name, make in changes.items()}))


def test_the_number_of_classes_is_that_of_the_head() -> None:
    assert TensorMask(*make_parts()).num_classes == 3
    with pytest.raises(ValueError, match=r"head.num_classes is 3 and num_classes is 2"):
        TensorMask(*make_parts(), num_classes=2)


def test_feature_maps_of_other_strides_or_channels() -> None:
    backbone = OwnBackbone([4, 8, 16])
    model = TensorMask.build(backbone=backbone, **SMALL).eval()
    backbone.convs[0].stride = (2, 2)
    with pytest.raises(ValueError, match=r"backbone returned .*32, 48.*backbone.strides .4, 8, 16"):
        model([make_image(64, 96)])
    backbone.convs[0].stride = (4, 4)
    backbone.convs[2] = nn.Conv2d(16, 23, 3, 2, 1)
    with pytest.raises(ValueError, match=r"backbone returned .*23. channels"):
        model([make_image(64, 96)])
    identity = TensorMask(*make_parts(fpn=nn.Identity())).eval()
    with pytest.raises(ValueError, match=r"fpn returned .*64, .* but head.in_channels is 16"):
        identity([make_image(64, 96)])
    identity.windows = Windows.of_strides([4, 8, 16])
    with pytest.raises(ValueError, match=r"fpn returned .*windows.strides .4, 8, 16. give"):
        identity([make_image(64, 96)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backbone": nn.Conv2d(3, 8, 3)}, "backbone needs the attributes out_channels"),
        ({"backbone": OwnBackbone([4, 16])}, "in_strides must be consecutive powers of 2"),
        ({"backbone": OwnBackbone([4, 8]), "windows": Windows.of_strides([2, 4])}, "levels"),
        ({"backbone": OwnBackbone([32, 64])}, "coarsest stride, 64"),
        ({"num_class": 3}, "nearest name is 'num_classes'"),
        ({"maskloss": None}, "nearest name is 'mask_loss'"),
        ({"fpn": None}, "'fpn' is not an option"),
        ({"head": "bipyramyd"}, "nearest name is 'bipyramid'"),
        ({"head": "upscale_natural"}, "does not upscale"),
        ({"num_classes": "three"}, "NUM_CLASSES.*'three'"),
        ({"num_classes": 0}, "NUM_CLASSES.*0"),
    ],
)
def test_options_that_cannot_be_built(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TensorMask.build(**{"depth": 18, **SMALL, **options})


def test_values_set_by_attribute_are_checked() -> None:
    for group, key in ("MODEL.TENSOR_MASK", "NUM_CLASSES"), ("TEST", "DETECTIONS_PER_IMAGE"):
        cfg = get_cfg()
        setattr(functools.reduce(getattr, group.split("."), cfg), key, "three")
        with pytest.raises(ValueError, match=f"{group}.{key} takes int, got str"):
            build_model(cfg)
