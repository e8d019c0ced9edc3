"""image_to_rgb: what is converted, by hand, and what is refused with the call that mends it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import tensormask
from tensormask.data.arrays import image_to_rgb
from tensormask.data.images import read_image, stretch_to_8_bits
from tensormask.utils.errors import UserError

RGB = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3) * 8
GREY = RGB[..., 0]
REPEATED = np.repeat(GREY[..., None], 3, axis=2)
ALPHA = np.dstack([RGB, GREY])
DEEP = np.array([[100, 1000], [4000, 5000]], np.uint16)
CHW = torch.from_numpy(RGB).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image, expected",
    [
        (RGB, RGB),
        (np.asfortranarray(RGB), RGB),
        (GREY, REPEATED),
        (GREY[..., None], REPEATED),
        (GREY.view(np.matrix), REPEATED),
        (ALPHA, RGB),
        (np.dstack([GREY, GREY]), REPEATED),
        (GREY > 50, np.where(REPEATED > 50, 255, 0)),
        (RGB / 255, RGB),
        ((GREY / 255).astype(np.float16), REPEATED),
        (np.full((2, 5, 3), 1.00001), np.full((2, 5, 3), 255)),
        (RGB / 255 - 0.00001, RGB),
        (DEEP, np.repeat(stretch_to_8_bits(DEEP)[..., None], 3, axis=2)),
        (CHW, RGB),
        (CHW > 50, np.where(RGB > 50, 255, 0)),
        (CHW / 255, RGB),
        ((CHW / 255).double().requires_grad_(), RGB),
        (torch.ones(3, 2, 5, dtype=torch.bfloat16), np.full((2, 5, 3), 255)),
        (torch.ones(3, 2, 5).to(torch.float8_e4m3fn), np.full((2, 5, 3), 255)),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(ALPHA), RGB),
        (Image.fromarray(GREY), REPEATED),
    ],
)
def test_images_in_memory(image, expected):
    pixels = image_to_rgb(image)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_an_rgb_array_is_not_copied():
    assert np.shares_memory(image_to_rgb(RGB), RGB)


@pytest.mark.parametrize("image", [RGB[..., ::-1], ALPHA[..., [2, 1, 0, 3]], CHW.flip(0)])
def test_bgr(image):
    np.testing.assert_array_equal(image_to_rgb(image, "BGR"), RGB)


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
def test_deep_grey_of_pil_equals_that_of_its_file(tmp_path, dtype):
    image = Image.fromarray(DEEP.astype(dtype))
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(image_to_rgb(image), read_image(tmp_path / "a.tif"))


@pytest.mark.parametrize("dtype", "u2 >u2 i2 i4 >i4 u4 i8 u8".split())
@pytest.mark.parametrize("factor, offset", [(1, 0), (16, 0), (128, -5000)])
def test_deep_colors_are_stretched_over_one_range(dtype, factor, offset):
    """Also where they are in 0..255, and in every layout of memory."""
    if offset < 0 and np.dtype(dtype).kind == "u":
        offset = 0
    values = (RGB.astype(np.int64) * factor + offset).astype(dtype)
    assert values.dtype == dtype
    expected = stretch_to_8_bits(values)
    assert (expected.min(), expected.max()) == (0, 255)
    values.flags.writeable = False
    turned = np.ascontiguousarray(values[::-1, ::-1, ::-1])
    alpha = np.concatenate([values, values[..., :1] * 0 + np.iinfo(dtype).max], axis=2)
    for array in (values, np.asfortranarray(values), turned[::-1, ::-1, ::-1], alpha):
        np.testing.assert_array_equal(image_to_rgb(array), expected)
        np.testing.assert_array_equal(image_to_rgb(array[..., 2::-1], "BGR"), expected)
    if values.dtype.isnative:
        tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
        np.testing.assert_array_equal(image_to_rgb(tensor), expected)


NAN = np.full((2, 3, 3), np.nan)
# Images, and the calls that their errors name, which must give an image.
MENDED = {
    "image.view(np.uint8)": GREY.astype(np.int8),
    "image.astype(np.uint8)": RGB.astype(np.float32),
    "tensormask.data.images.stretch_to_8_bits(image)": DEEP.astype(np.float32),
    " tensormask.data.images.stretch_to_8_bits(image)": RGB.astype(np.float16) * 7,
    "  tensormask.data.images.stretch_to_8_bits(image)": np.array([[np.nan, -1], [3, np.inf]]),
    "np.nan_to_num(image, nan=0, posinf=1, neginf=0)": NAN,
    " np.nan_to_num(image, nan=0, posinf=1, neginf=0)": np.array([[0.5, 1], [-np.inf, np.inf]]),
    "image.transpose(1, 2, 0)": CHW.numpy(),
    "list(images), for a list of results": RGB[None],
    "image.permute(2, 0, 1)": torch.from_numpy(RGB),
    "image.expand(3, -1, -1)": CHW[:1],
    " image.expand(3, -1, -1)": CHW[0],
    "image[:3]": torch.cat([CHW, CHW[:1]]),
    " list(images), for a list of results": CHW[None],
    "image.to(torch.uint8)": CHW.float() + 1,
    "image.view(torch.uint8)": CHW.to(torch.int8),
    "image.nan_to_num(nan=0, posinf=1, neginf=0)": torch.full((3, 2, 5), torch.nan),
    "torch.from_numpy(tensormask.data.images.stretch_to_8_bits("
    "image.detach().cpu().float().numpy()))": (CHW * 7.0).bfloat16().requires_grad_(),
    "iter(images), for a generator of results": range(3),
    "PIL.Image.open(io.BytesIO(data))": b"\x89PNG",
    "PIL.Image.open(file)": io.BytesIO(b""),
}


@pytest.mark.parametrize("call", MENDED)
def test_the_call_that_mends_it(call):
    image = MENDED[call]
    with pytest.raises(UserError) as raised:
        image_to_rgb(image)
    call = call.strip()
    assert str(raised.value).endswith(f"give {call}")
    if not call.startswith(("list", "iter", "PIL")):
        names = {"image": image, "np": np, "torch": torch, "tensormask": tensormask}
        assert image_to_rgb(eval(call, names)).shape[0] == 2


@pytest.mark.parametrize(
    "image, message",
    [
        (None, r"None.*cv2\.imread"),
        (RGB - 100.0, "before normalization"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (np.zeros((2, 3, 5), np.uint8), r"\(H, W, 3\)"),
        (np.zeros(5, np.uint8), r"\(H, W, 3\)"),
        (np.zeros((2, 3, 3), complex), "complex128"),
        (np.zeros((2, 3, 3), object), "object"),
        (np.array(None), "no pixels|dtype|H, W"),
        (torch.zeros(3, 0, 4), "no pixels"),
        (torch.full((3, 2, 2), 200.0), "values from 200 to 200"),
        (3, "int is not an image"),
        ([RGB], "list is not an image"),
        ({"image": RGB}, "dict is not an image"),
    ],
)
def test_other_objects_are_refused(image, message):
    with pytest.raises(UserError, match=message):
        image_to_rgb(image)


def test_a_broken_pil_image(tmp_path):
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "a.bmp")
    content = (tmp_path / "a.bmp").read_bytes()
    with Image.open(io.BytesIO(content[:200])) as image:
        with pytest.raises(UserError, match="cannot be read"):
            image_to_rgb(image)
