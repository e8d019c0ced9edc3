"""Convolutions at chosen locations against the same convolutions of the whole feature map."""

from unittest.mock import create_autospec, patch

import pytest
import tiny
import torch
from pretended_cuda import pretend
from torch import nn
from torch.testing import assert_close

from tensormask.layers.plain import PlainLayer, plain_tower
from tensormask.modeling import tiles
from tensormask.modeling.head import ClassBoxHead, DenseOutputs, conv_tower
from tensormask.modeling.mask_head import MaskHead


@pytest.fixture
def always_tiles(monkeypatch) -> None:
    """Use tiles whatever the work, also on small feature maps."""
    monkeypatch.setattr(tiles, "_MAX_WORK", 1e9)
    monkeypatch.setattr(tiles, "MIN_LOCATIONS", 0)


def make_layers(num_convs: int, norm: str = "") -> list[PlainLayer]:
    torch.manual_seed(0)
    tower = conv_tower(3, 5, num_convs, norm=norm).double().eval()
    for name, value in [*tower.named_parameters(), *tower.named_buffers()]:
        if "var" in name:
            nn.init.uniform_(value, 0.5, 2)
        elif value.dim() == 1:  # makes values outside of the border nonzero, unless reset
            nn.init.normal_(value)
    return plain_tower([*tower])


def whole_feature_map(layers, x, n, row, column):
    modules = [layer if layer.norm else layer[:1] for layer in layers]
    for conv_norm in modules[:-1]:
        x = nn.Sequential(*conv_norm)(x).relu()
    return nn.Sequential(*modules[-1])(x)[n, :, row, column]


@pytest.mark.parametrize(
    "num_convs, norm", [(1, ""), (2, ""), (5, ""), (1, "LN"), (3, "LN"), (3, "BN")]
)
@pytest.mark.parametrize(
    "locations",
    [
        pytest.param([(0, 20, 20)], id="one"),
        pytest.param([(1, 0, 0), (0, 0, 40), (1, 44, 0), (0, 44, 40)], id="corners"),
        pytest.param([(1, 7, 7), (1, 8, 8), (0, 7, 8), (1, 7, 7)], id="borders, one repeated"),
        pytest.param([], id="none"),
    ],
)
def test_values_and_gradients_of_convolve_at(num_convs, norm, locations, always_tiles) -> None:
    layers = make_layers(num_convs, norm)
    x = torch.randn(2, 3, 45, 41, dtype=torch.float64, requires_grad=True)
    n, row, column = torch.tensor(locations, dtype=torch.int64).reshape(-1, 3).T
    modules = nn.ModuleList(module for layer in layers for module in layer if module)
    wanted = [x, *modules.parameters()]
    results = []
    for function in (whole_feature_map, tiles.convolve_at):
        values = function(layers, x, n, row, column)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        results.append([values, *torch.autograd.grad(values, wanted, grad)])
    assert results[0][0].shape == (len(locations), 5)
    assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [1, 5, 16])
def test_feature_maps_smaller_than_a_tile_with_its_border(side, always_tiles) -> None:
    layers = make_layers(3)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    locations = torch.ones(1, side, side).nonzero().T
    assert_close(tiles.convolve_at(layers, x, *locations), whole_feature_map(layers, x, *locations))


def test_work_depends_on_the_number_of_locations() -> None:
    """Few locations: convolutions of tiles. All locations: one of the feature map."""
    layers = make_layers(2)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    few, every = torch.tensor([[0, 0], [9, 9], [9, 10]]), torch.ones(1, 64, 64).nonzero().T
    for locations, sizes in (few, (12, 10)), (every, (64, 64)):
        with patch.object(nn.functional, "conv2d", wraps=nn.functional.conv2d) as conv2d:
            tiles.convolve_at(layers, x, *locations)
        shapes = [call.args[0].shape for call in conv2d.call_args_list]
        assert shapes == [(1, 3, *sizes[:1] * 2), (1, 5, *sizes[1:] * 2)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mask_iou", [False, True])
def test_outputs_at_windows_equal_the_dense_ones(checkpointed: bool, mask_iou: bool) -> None:
    torch.manual_seed(0)
    options = {"init": "he", "checkpointed": checkpointed, "mask_iou": mask_iou}
    head = ClassBoxHead(6, 2, 3, bbox_channels=5, **options)
    x = torch.randn(2, 6, 40, 56)
    dense = DenseOutputs([x], *head([x]))
    n, size, row, column = torch.tensor([[1, 1, 3, 9], [0, 0, 39, 55], [1, 0, 3, 9]]).T
    expected = dense.deltas[0].unflatten(1, (2, -1))[n, size, :, row, column]
    features = head.bbox_subnet(x)
    deltas = head.bbox_pred(features).unflatten(1, (2, 4))[n, size, :, row, column]
    assert_close(expected[:, :4], deltas)
    if mask_iou:
        assert_close(expected[:, 4], head.iou_pred(features)[n, size, row, column])
    at_windows = DenseOutputs([x], *head([x], dense_boxes=False))
    assert at_windows.deltas is None
    for outputs in (dense, at_windows):
        assert_close(head.outputs_at(outputs, 0, n, size, row, column), expected)
        assert_close(head.deltas_at(outputs, 0, n, size, row, column), deltas)


@pytest.mark.parametrize("side", [8, 100])
def test_tiles_that_boxes_touch(side: int) -> None:
    """Against a comparison of every box with every tile; boxes leave the feature map."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(-20, 90, (12, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(0, side, (12, 2), generator=generator)], 1)
    boxes = boxes[(boxes[:, 2:] >= 0).all(1) & (boxes[:, :2] < torch.tensor([50, 70])).all(1)]
    n = torch.arange(len(boxes)) % 2
    expected = {
        (image, row, column)
        for image, (y0, x0, y1, x1) in zip(n.tolist(), boxes.tolist(), strict=True)
        for row in range(7)
        for column in range(9)
        if y0 < 8 * row + 8 and y1 >= 8 * row and x0 < 8 * column + 8 and x1 >= 8 * column
    }
    touched = tiles.Tiles.touching(torch.zeros(2, 1, 50, 70), n, boxes)
    assert 0 < len(expected) < 2 * 7 * 9
    assert set(zip(*(t.tolist() for t in touched), strict=True)) == expected


def test_masks_at_windows_from_tiles_equal_the_whole_feature_map(monkeypatch) -> None:
    """Values and gradients, with windows in the middle, at the borders and in the corners."""
    torch.manual_seed(0)
    head = MaskHead(6, [11, 15], (4, 8, 16), channels=5, init="he").double()
    for pred in head.mask_pred:
        nn.init.normal_(pred.weight, std=0.5)
        nn.init.normal_(pred.bias)
    shapes = [(104, 136), (52, 68), (26, 34)]
    features = [torch.randn(2, 6, *s, dtype=torch.float64, requires_grad=True) for s in shapes]
    groups = [
        (level, size, torch.tensor([[0, 0, 0], [1, h - 1, w - 1], [1, h // 2, w // 3]]))
        for level, (h, w) in enumerate(shapes)
        for size in range(2)
    ]
    wanted, results = [*features, *head.parameters()], []
    scatter = create_autospec(tiles.Tiles.scatter, side_effect=tiles.Tiles.scatter)
    monkeypatch.setattr(tiles.Tiles, "scatter", scatter)
    for max_work in (-1, 1e9):
        monkeypatch.setattr(tiles, "_MAX_WORK", max_work)
        masks = head(features, groups)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in masks]
        results.append([*masks, *torch.autograd.grad(masks, wanted, grads)])
    num_tiles = [len(call.args[1]) for call in scatter.call_args_list]
    assert len(num_tiles) == len(groups)
    assert max(num_tiles[:2]) < 2 * 13 * 17  # not all tiles of the finest level
    assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_box_tower_convolves_each_image_once(monkeypatch) -> None:
    """All windows are candidates: one convolution per image and level."""
    model = tiny.build(opts=["MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.0]).eval()
    convolved = []
    model.head.bbox_pred.register_forward_hook(
        lambda module, inputs, output: convolved.append(tuple(inputs[0].shape))
    )
    with torch.inference_mode():
        model([tiny.make_image(64, 64, seed) for seed in range(3)])
    assert convolved == [(1, 16, s, s) for s in (16, 8, 4, 2, 1, 1)] * 3


@pytest.mark.usefixtures("nothing_left_behind")
def test_tiles_on_a_gpu_wait_for_nothing(always_tiles, monkeypatch) -> None:
    """In training, where windows are on the CPU: losses and gradients of whole feature maps."""
    image, truth = tiny.make_image(96, 128), tiny.target(96, 128, [[20.0, 30.0, 60.0, 70.0]])
    convolve = create_autospec(tiles.Tiles.convolve, side_effect=tiles.Tiles.convolve)
    monkeypatch.setattr(tiles.Tiles, "convolve", convolve)
    results = []
    for min_saved in (1e18, -1e18):
        monkeypatch.setattr(tiles, "MIN_SAVED_ON_GPU", min_saved)
        with pretend() as record:
            model = tiny.build(opts=["MODEL.DEVICE", "cuda"]).train()
            targets = [{name: value.pin_memory() for name, value in truth.items()}]
            for _ in range(2):  # constants are copied in the first
                record.clear()
                losses = model([image], targets)
            assert not record.waits
            assert not record.mixes
            sum(losses.values()).backward()
            grads = {name: p.grad.cpu() for name, p in model.named_parameters()}
            results.append(({name: loss.cpu() for name, loss in losses.items()}, grads))
    assert len(convolve.call_args_list) > 4  # of the box tower and of the mask tower
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_tiles_on_a_gpu_must_save_multiplications() -> None:
    """Three times as many in training, whose backward pass has two more products."""
    layers = [PlainLayer(nn.Conv2d(256, 256, 3, padding=1, device="meta"))]
    few = tiles.Tiles(*torch.zeros(3, 10, dtype=torch.int64))
    many = tiles.Tiles(*torch.zeros(3, 1000, dtype=torch.int64))
    x = torch.empty(1, 256, 200, 336, device="meta")
    expected = [(few, x, True, True), (few, x[:, :, :40], True, False), (many, x, True, False)]
    for chosen, features, grad, faster in [*expected, (few, x[:, :, :100], False, False)]:
        with torch.set_grad_enabled(grad):
            assert chosen.are_faster(layers, features) == faster
