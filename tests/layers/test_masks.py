"""Cropping to windows and pasting back: by hand, and against torchvision and the formula."""

import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_cuda import pretend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from tensormask.layers import _native, crop_masks, mask_boxes, op_backend, paste_masks
from tensormask.layers import masks as masks_module
from tensormask.layers.masks import paste_regions


def test_crop_by_hand() -> None:
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[1, 1:3, 2:6] = True
    window = torch.tensor([[0.0, 0.0, 6.0, 6.0]])
    # Cells of 2x2 pixels: the object fills half of rows 0 and 1, and of columns 1 and 2.
    cropped = crop_masks(mask, torch.tensor([1]), window, 3)
    assert cropped.tolist() == [[[False, True, True], [False, True, True], [False, False, False]]]
    assert not crop_masks(mask, torch.tensor([0]), window, 3).any()


def test_crop_of_a_window_beyond_the_image() -> None:
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    cropped = crop_masks(mask, torch.tensor([0]), torch.tensor([[-8.0, -8.0, 8.0, 8.0]]), 4)
    assert cropped.tolist() == [[[False] * 4] * 2 + [[False, False, True, True]] * 2]


def test_crop_equals_roi_align_at_once_and_in_parts(monkeypatch) -> None:
    """A limited number of mask pixels is converted to floating at a time."""
    masks = torch.rand(7, 40, 50) > 0.5
    objects = torch.tensor([6, 0, 1, 2, 6, 4, 1])
    boxes = torch.rand(7, 4) * 40 - 10
    boxes[:, 2:] += boxes[:, :2] + 20
    rois = torch.cat([torch.arange(7.0)[:, None], boxes], dim=1)
    expected = roi_align(masks[objects][:, None].float(), rois, 15, 1.0, 0, True)[:, 0] >= 0.5
    for limit in (1 << 25, 2 * 40 * 50, 1):
        monkeypatch.setattr(masks_module, "_MAX_PIXELS_AT_ONCE", limit)
        for kind in (masks, masks.byte(), masks.float()):
            assert torch.equal(crop_masks(kind, objects, boxes, 15), expected)
        for part in (1, 2, 7):  # on a GPU
            crops = masks_module._crop_from_all(masks, objects, boxes, 15, part)
            assert torch.equal(crops, expected)
        assert torch.equal(crop_masks(masks[:3], objects[1:4], boxes[1:4], 15), expected[1:4])
        for crop in (crop_masks, functools.partial(masks_module._crop_from_all, num_masks=2)):
            assert crop(masks[:0], objects[:0], boxes[:0], 15).shape == (0, 15, 15)


class Calls(TorchDispatchMode):
    """Names the operators that are called, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        self.largest = max(self.largest, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("limit", [1 << 25, 480 * 480])
def test_crop_on_a_gpu(monkeypatch, limit) -> None:
    """No operator makes the host wait, and none is large where algorithms are deterministic.

    torchvision's function `roi_align` would take 480 * 480 samples for each mask pixel.
    """
    module = sys.modules[roi_align.__module__]  # as on a GPU with Triton
    monkeypatch.setattr(module, "is_compile_supported", lambda device: True, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(masks_module, "_MAX_PIXELS_AT_ONCE", limit)
    torch.use_deterministic_algorithms(True)
    try:
        with FakeTensorMode(), Calls() as calls:  # where a value is read, FakeTensor raises
            masks = torch.zeros(3, 480, 480, dtype=torch.bool, device="cuda")
            objects = torch.zeros(10, dtype=torch.int64, device="cuda")
            cropped = crop_masks(masks, objects, torch.zeros(10, 4, device="cuda"), 15)
    finally:
        torch.use_deterministic_algorithms(False)
    assert cropped.shape == (10, 15, 15)
    assert "torchvision::roi_align" in calls.names
    assert calls.largest <= masks.numel()


def test_paste_by_hand() -> None:
    """A 2x2 mask with one filled pixel, into a window of 4x4 image pixels that begins at (1, 1).

    Along one axis, the centers of the image pixels have the mask coordinates -1/4, 1/4, 3/4, 5/4
    (mask pixels are centered at 0 and 1). There the filled pixel 0 has the weights 3/4, 3/4, 1/4,
    0. Of their products only 9/16 reaches 1/2.
    """
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    pasted = paste_masks(mask, torch.tensor([[1.0, 1.0, 5.0, 5.0]]), (6, 7))
    assert pasted.shape == (1, 6, 7)
    assert pasted.nonzero().tolist() == [[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2]]


def test_a_probability_of_one_half_is_object() -> None:
    box = torch.tensor([[-6.0, -6.0, 12.0, 12.0]])
    assert paste_masks(torch.full((1, 3, 3), 0.5), box, (6, 6)).all()


def test_paste_equals_the_formula_over_the_whole_image() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 9, 9, generator=generator)
    size = torch.rand(6, 2, generator=generator) * 30 + 2
    corner = torch.rand(6, 2, generator=generator) * 60 - 20
    boxes = torch.cat([corner, corner + size], dim=1)
    pasted = paste_masks(masks, boxes, (32, 40))
    for mask, box, result in zip(masks, boxes, pasted, strict=True):
        ys = (torch.arange(32) + 0.5 - box[1]) / (box[3] - box[1]) * 9 - 0.5
        xs = (torch.arange(40) + 0.5 - box[0]) / (box[2] - box[0]) * 9 - 0.5
        # Bilinear with zeros outside: a triangle of half-width 1 around each mask pixel.
        rows = (1 - (ys[:, None] - torch.arange(9)).abs()).clamp(min=0)
        columns = (1 - (xs[:, None] - torch.arange(9)).abs()).clamp(min=0)
        soft = rows @ mask @ columns.T
        sure = (soft - 0.5).abs() > 1e-4
        assert torch.equal(result[sure], (soft >= 0.5)[sure])
        assert sure.float().mean() > 0.99


def test_regions_are_clipped_to_the_image() -> None:
    """Masks of unequal sizes, inside of the image, across its border, around it, and outside."""
    boxes = torch.tensor([[2.2, 3.0, 5.0, 7.5], [-4, 5, 3, 9], [-9, -9, 30, 30], [20, 0, 25, 9]])
    masks = [torch.ones(side, side) for side in (2, 3, 4, 5)]
    regions = list(paste_regions(masks, boxes, (10, 12)))
    corners_and_sizes = [(x0, y0, *region.shape) for x0, y0, region in regions]
    assert corners_and_sizes == [(1, 2, 7, 5), (0, 4, 6, 4), (0, 0, 10, 12), (0, 0, 0, 0)]
    assert all(region.dtype == torch.bool for _, _, region in regions)
    pasted = paste_masks(masks, boxes, (10, 12))
    for image, (x0, y0, region) in zip(pasted, regions, strict=True):
        height, width = region.shape
        assert torch.equal(image[y0 : y0 + height, x0 : x0 + width], region)
        assert image.sum() == region.sum()
    assert pasted[2].all()
    assert not pasted[3].any()
    assert paste_masks(torch.ones(0, 3, 3), boxes[:0], (20, 30)).shape == (0, 20, 30)


def test_mask_boxes_by_hand() -> None:
    logits = torch.full((4, 2, 4), -1.0)
    logits[0, 1, 2] = 0.0  # one pixel, at the threshold
    logits[1] = 3.0
    logits[3, 0, [0, 2]] = logits[3, 1, 1] = 3.0  # rows and columns with several pixels
    windows = torch.tensor([[10.0, 20, 18, 28], [-4, 0, 4, 8], [0, 0, 8, 8], [0, 0, 8, 8]])
    expected = [[14, 24, 16, 28], [-4, 0, 4, 8], [0, 0, 0, 0], [0, 0, 6, 8]]
    assert mask_boxes(logits, windows).tolist() == expected
    assert mask_boxes(logits[:0], windows[:0]).shape == (0, 4)


def paste_compiled(masks, boxes, size) -> torch.Tensor:
    """Paste as on a GPU with the compiled op."""
    return torch.ops.tensormask.paste_masks(*masks_module._packed(masks, boxes), *size)


native = pytest.mark.skipif("cpu" not in _native.DEVICES, reason="no compiled op")
on_a_gpu = pytest.mark.parametrize(
    "paste", [masks_module._paste_whole, pytest.param(paste_compiled, marks=native)]
)


@on_a_gpu
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pasting_on_a_gpu_equals_regions(paste, data) -> None:
    """Any sizes of masks and frames, boxes beyond the frame, outside, tiny and without an area.

    Only where a probability is 1/2 but for rounding, pixels may differ.
    """
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 70)))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5)
    )
    corner = st.floats(-60, 90, width=32)
    extent = st.one_of(st.just(0.0), st.floats(0, 3, width=32), st.floats(0, 150, width=32))
    corners = [[data.draw(corner), data.draw(corner)] for _ in shapes]
    boxes = torch.tensor([[x, y, x + data.draw(extent), y + data.draw(extent)] for x, y in corners])
    boxes = boxes.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    masks = [torch.rand(shape, generator=generator).to(boxes.dtype) for shape in shapes]
    pasted, expected = paste(masks, boxes, size), paste_masks(masks, boxes, size)
    assert pasted.shape == expected.shape
    assert pasted.dtype == torch.bool
    for k, y, x in (pasted != expected).nonzero().tolist():
        left, top, right, bottom = boxes[k].double().tolist()
        height, width = shapes[k]
        row = (y + 0.5 - top) / (bottom - top) * height - 0.5
        column = (x + 0.5 - left) / (right - left) * width - 0.5
        along_y = (1 - (row - torch.arange(height)).abs()).clamp(min=0).double()
        along_x = (1 - (column - torch.arange(width)).abs()).clamp(min=0).double()
        assert abs(along_y @ masks[k].double() @ along_x - 0.5) < 1e-3


@on_a_gpu
def test_a_gpu_pastes_exact_halves_and_all_dtypes(paste) -> None:
    box = torch.tensor([[-7.3, -6.0, 12.1, 13.7]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert paste(torch.full((1, 7, 3), 0.5, dtype=dtype), box, (6, 6)).all()
        assert not paste(torch.full((1, 7, 3), 0.499, dtype=dtype), box, (6, 6)).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert not paste(torch.full((1, 7, 3), 0.4999), box, (6, 6)).any()


@pytest.mark.parametrize(
    ("backend", "launches"), [("reference", 65), pytest.param("native", 3, marks=native)]
)
def test_the_host_does_not_wait_for_pasted_masks(backend, launches) -> None:
    """Compiled: the masks in one tensor, their sizes in one pinned copy, and the pasting itself."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(side, side, generator=generator) for side in (15, 30, 15, 60) * 3]
    boxes = torch.rand(12, 4, generator=generator) * 40
    boxes[:, 2:] += boxes[:, :2] + 3
    expected = paste_masks(masks, boxes, (70, 90))
    with pretend() as record, op_backend(backend):
        on_gpu, boxes = [mask.cuda() for mask in masks], boxes.cuda()
        record.clear()
        pasted = paste_masks(on_gpu, boxes, (70, 90))
        totals = record.totals()
        assert paste_masks([], boxes[:0], (70, 90)).shape == (0, 70, 90)
    assert (totals["waits"], totals["mixes"], totals["pinned"]) == (0, 0, 1)
    assert totals["launches"] <= launches
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pasting_on_the_meta_device(backend) -> None:
    masks, boxes = torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, 4, device="meta")
    with op_backend(backend):
        pasted = paste_masks(masks, boxes, (4, 6))
    assert (pasted.shape, pasted.dtype, pasted.device.type) == ((2, 4, 6), torch.bool, "meta")


def test_masks_on_a_gpu_are_fetched_once() -> None:
    """For results files, which hold one mask after the other."""
    masks = [torch.rand(3, 4), torch.rand(5, 5, dtype=torch.float64), torch.rand(2, 2).half()]
    boxes = torch.tensor([[0.5, 1.0, 9.0, 8.0]] * 3)
    expected = list(paste_regions(masks, boxes, (10, 12)))
    with pretend() as record:
        on_gpu, boxes = [mask.cuda() for mask in masks], boxes.cuda()
        record.clear()
        regions = list(paste_regions(on_gpu, boxes, (10, 12)))
        assert record.waits.total() == 1, record.waits
    for found, region in zip(regions, expected, strict=True):
        assert found[:2] == region[:2]
        assert torch.equal(found[2], region[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_half_precision_in_a_large_image(dtype) -> None:
    """Locations, and what is computed from them, are not rounded to it."""
    masks = torch.rand(2, 15, 15, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = torch.tensor([[-7.5, 3.0, 800.0, 590.0], [640.2, 30.7, 1210.0, 620.0]])
    expected = paste_masks(masks.float(), boxes, (600, 1200))
    for _ in range(2):
        assert torch.equal(paste_masks(masks, boxes, (600, 1200)), expected)


@native
def test_the_compiled_op_in_graphs_and_with_wrong_arguments() -> None:
    """`paste_masks` of layers passes it only what fits."""
    op = torch.ops.tensormask.paste_masks.default
    masks = [torch.rand(3, 4), torch.rand(2, 2)]
    values, layout, boxes, largest = masks_module._packed(masks, torch.tensor([[0.0, 1, 9, 8]] * 2))
    torch.library.opcheck(op, (values, layout, boxes, largest, 10, 12))
    assert op(values, layout[:0], boxes[:0], largest, 10, 12).shape == (0, 10, 12)
    for arguments, words in (
        ((values.half(), layout, boxes, largest), "values must be"),
        ((values, layout.int(), boxes, largest), "layout must be"),
        ((values, layout, boxes.double(), largest), "boxes must be"),
        ((values, layout, boxes[:1], largest), "boxes must be"),
        ((values[1:], layout, boxes, largest), "outside of 15 values"),
        ((values, layout, boxes, 3), "wider than 3"),
        ((values, layout, boxes, -3), "largest width must not be negative, got -3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*arguments, 10, 12)


def test_pasting_whole_images_equals_regions(monkeypatch) -> None:
    """Masks of equal size are pasted together, in parts of limited size."""
    generator = torch.Generator().manual_seed(0)
    sides = [11, 15, 11, 30, 15, 11]
    masks = [torch.rand(side, side, generator=generator) for side in sides]
    boxes = torch.rand(6, 4, generator=generator) * 40 - 10
    boxes[:, 2:] += boxes[:, :2].abs() + 20
    expected = paste_masks(masks, boxes, (50, 60))
    assert expected.flatten(1).any(1).all()
    monkeypatch.setattr(masks_module, "_MAX_PIXELS_AT_ONCE", 2 * 50 * 60)
    assert torch.equal(masks_module._paste_whole(masks, boxes, (50, 60)), expected)
