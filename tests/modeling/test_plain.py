"""Modules that fast paths do not know are called: hooks, wrappers, other layers, other forwards."""

import pytest
import torch
from tiny import build, make_image, target, with_detections
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from tensormask.layers.plain import is_plain, is_plain_conv, plain_tower

BOXES = [[10.0, 20.0, 50.0, 60.0], [100.0, 110.0, 150.0, 156.0]]
SIZE = 160  # px: here plain towers are evaluated at tiles
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN"]


def losses_of(model, size: int = SIZE) -> dict[str, Tensor]:
    boxes = [box for box in BOXES if max(box) < size]
    return model.train()([make_image(size, size)], [target(size, size, boxes)])


def detect(model, size: int = SIZE) -> dict[str, Tensor]:
    with torch.inference_mode():
        return model.eval()([make_image(size, size)])[0]


@pytest.mark.parametrize("head, depth", [("natural", 18), ("bipyramid", 50)])
def test_hooks_of_all_modules_fire_and_change_nothing(head: str, depth: int) -> None:
    """At every size, in training and inference."""
    model = with_detections(build(head, [*FROZEN, "MODEL.RESNETS.DEPTH", depth]))
    expected = [losses_of(model), detect(model)["scores"]]
    called: set[str] = set()
    names = {
        n for n, m in model.named_modules() if not isinstance(m, nn.ModuleDict | nn.ModuleList)
    }
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.add(name))
    for size in (64, SIZE):
        for run in (losses_of, detect):
            called.clear()
            result = run(model, size)
            unused = {name.partition(".mask_pred")[0] for name in names - called}
            # Of the sizes of windows, the detections may have one only.
            assert unused <= (set() if run is losses_of else {"criterion", "mask_head"})
            assert "mask_head" in called
            if size == SIZE:
                actual = result if run is losses_of else result["scores"]
                assert_close(actual, expected[run is detect], rtol=1e-3, atol=1e-4)


def test_outputs_that_hooks_keep_are_not_changed() -> None:
    """Although a residual block and the pyramid add in place."""
    model, kept = build(opts=FROZEN).train(), []

    def keep(module, inputs, output) -> None:
        kept.append((output, output.clone()))

    block = model.backbone.res3[0]
    for module in (block.bn1, block.bn2, block.downsample[1], model.fpn.lateral["p3"]):
        module.register_forward_hook(keep)
    losses_of(model, 96)
    assert len(kept) == 4
    assert all(torch.equal(output, copy) for output, copy in kept)


def test_backward_hooks_of_layers_before_additions_and_of_towers() -> None:
    model, seen = build(opts=FROZEN), []
    towers = model.head.bbox_subnet, model.mask_head.mask_fuse
    for module in (model.backbone.res3[0].bn2, model.fpn.lateral["p3"], *towers):
        module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(module))
    sum(losses_of(model).values()).backward()
    assert len(set(seen)) == 4


class LoRA(nn.Module):
    """A frozen convolution plus one of low rank."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        sizes = {"kernel_size": conv.kernel_size, "padding": conv.padding, "stride": conv.stride}
        self.down = nn.Conv2d(conv.in_channels, 2, **sizes, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_wrapped_convolutions_learn(head: str) -> None:
    model = build(head, FROZEN)
    block = model.backbone.res3[0]
    block.conv1, block.downsample[0] = LoRA(block.conv1), LoRA(block.downsample[0])
    towers = [model.head.bbox_subnet, model.mask_head.mask_subnet]
    towers += [model.mask_head.mask_fuse] if head == "bipyramid" else []
    for tower in towers:
        tower[0] = LoRA(tower[0])
    model.head.bbox_pred = LoRA(model.head.bbox_pred)
    model.mask_head.mask_pred[0] = LoRA(model.mask_head.mask_pred[0])
    sum(losses_of(model).values()).backward()
    wrappers = [m for m in model.modules() if isinstance(m, LoRA)]
    assert len(wrappers) == len(towers) + 4
    assert all(m.up.weight.grad.abs().sum() > 0 for m in wrappers)


def own_tower(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), layer)


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_own_towers(head: str) -> None:
    """Deltas and masks at windows equal those of all windows."""
    model = build(head)
    model.head.bbox_subnet = own_tower(nn.GELU())
    model.mask_head.mask_subnet = own_tower(nn.SiLU())
    model.mask_head.mask_pred[0] = nn.Sequential(nn.GroupNorm(4, 16), model.mask_head.mask_pred[0])
    if head == "bipyramid":
        model.mask_head.mask_fuse = own_tower(nn.ReLU())
    with_detections_of_biases(model)
    assert losses_of(model)["loss_mask"].isfinite()
    inspection = model.eval().inspect(make_image(SIZE, SIZE))
    d = inspection.detections
    assert len(d.scores) > 0
    boxes = torch.stack([inspection.boxes(k)[s, y, x] for k, s, y, x in windows_of(d)])
    assert_close(d.boxes, boxes.clamp(0, SIZE), rtol=1e-4, atol=1e-3)
    (unpasted,) = model.detect([make_image(SIZE, SIZE)])
    for (k, s, y, x), mask in list(zip(windows_of(d), unpasted["window_masks"], strict=True))[:3]:
        assert_close(mask, inspection.masks(k, s)[y, x].sigmoid())


def with_detections_of_biases(model) -> None:
    nn.init.normal_(model.head.cls_score.bias, -1.0, 0.5)


def windows_of(detections) -> list[tuple[int, ...]]:
    d = detections
    return list(zip(*(c.tolist() for c in (d.level, d.size, d.y, d.x)), strict=True))


def test_activations_and_convolutions_of_blocks_are_called() -> None:
    model = build(opts=FROZEN)
    block = model.backbone.res3[0]
    before = model.backbone(model.preprocess([make_image(64, 64)]))[1]
    block.relu = nn.GELU()
    changed = model.backbone(model.preprocess([make_image(64, 64)]))[1]
    assert not torch.allclose(before, changed)
    block.conv2.dilation = block.conv2.padding = (2, 2)
    dilated = model.backbone(model.preprocess([make_image(64, 64)]))[1]
    assert not torch.allclose(dilated, changed)


def test_what_is_plain() -> None:
    def conv(**options) -> nn.Conv2d:
        return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})

    class Own(nn.Conv2d):
        pass

    class Quantized(nn.Parameter):
        pass

    hooked, patched, quantized = conv(), conv(), conv()
    quantized.weight = Quantized(quantized.weight)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    patched.forward = lambda x: x
    assert is_plain_conv(conv())
    unknown = [
        hooked,
        patched,
        quantized,
        Own(4, 4, 3, padding=1),
        parametrizations.weight_norm(conv()),
    ]
    unknown += [conv(groups=2), conv(dilation=2), conv(padding_mode="reflect")]
    assert not any(map(is_plain_conv, unknown))
    assert plain_tower([conv(), nn.ReLU(), conv()]) is not None
    for layers in ([conv(stride=2)], [conv(padding=0)], [conv(), nn.GELU()], [nn.ReLU(), conv()]):
        assert plain_tower(layers) is None
    assert is_plain(nn.ReLU(), nn.ReLU)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not is_plain(nn.ReLU(), nn.ReLU)
    handle.remove()
