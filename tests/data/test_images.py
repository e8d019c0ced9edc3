"""read_image: formats against PIL, grey of 16 bits by hand, and files that cannot be read."""

import errno
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tensormask.data.arrays import image_to_rgb
from tensormask.data.images import ImageError, read_image, stretch_to_8_bits


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colors(height=6, width=9):
    """Return an image of 4 x 4 blocks, whose colors survive JPEG."""
    blocks = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((4 * width, 4 * height), Image.Resampling.NEAREST)


MODES = "RGB.png RGB.jpg RGB.bmp RGB.webp RGB.tif L.png L.jpg 1.png P.png P.gif RGBA.png LA.png"


@pytest.mark.parametrize("name", [*MODES.split(), "CMYK.jpg", "CMYK.tif", "YCbCr.tif"])
def test_ordinary_images_equal_pils(tmp_path, name):
    original = colors()
    image = original.convert(name.split(".")[0])
    if "A" in image.mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    # PIL's result itself must be right: its brightness correlates with the original's.
    grey = np.asarray(original.convert("L")).ravel()
    assert np.corrcoef(grey, pixels.mean(axis=2).ravel())[0, 1] > 0.4


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 160, 10))])
def test_transparency_of_a_palette_is_dropped(tmp_path, transparency):
    image = colors().quantize(16)
    image.save(tmp_path / "a.png", transparency=transparency)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    colors().save(tmp_path / f"a{suffix}", exif=exif)
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), expected)


@pytest.mark.parametrize("dtype, value", [(np.uint8, 255), (np.uint16, 1000)])
def test_exif_orientation_by_hand(tmp_path, dtype, value):
    values = np.zeros((4, 6), dtype=dtype)
    values[0, 0] = value
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    Image.fromarray(values).save(tmp_path / "rotated.png", exif=exif)
    rotated = read_image(tmp_path / "rotated.png")
    assert rotated.shape == (6, 4, 3)
    assert rotated[0, 3].tolist() == [255, 255, 255]
    assert rotated.sum() == 3 * 255


def test_broken_metadata_are_ignored(tmp_path):
    colors().save(tmp_path / "a.jpg", exif=b"Exif\0\0no such thing")
    assert read_image(tmp_path / "a.jpg").shape == (24, 36, 3)


def test_unreadable_metadata_are_ignored(tmp_path, monkeypatch):
    """PIL raises various errors for them, by version."""
    colors().save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {}[0])
    assert read_image(tmp_path / "a.jpg").shape == (24, 36, 3)


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", "f4"])
def test_deep_grey_is_stretched(tmp_path, dtype):
    """Microscopes use 12 of 16 bits; PIL would make nearly all of the image white."""
    values = np.linspace(100, 4000, 2000).reshape(40, 50)
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif")
    assert pixels.shape == (40, 50, 3)
    assert (pixels == pixels[:, :, :1]).all()
    np.testing.assert_allclose(pixels[:, :, 0], (values - 100) / 3900 * 255, atol=1)


def test_stretch_by_hand():
    values = np.arange(10_001, dtype=np.int32)  # percentiles at 10 and 9990
    stretched = stretch_to_8_bits(values)
    assert stretched[[0, 28, 2505, 9972, 10_000]].tolist() == [0, 0, 64, 255, 255]
    assert (np.diff(stretched.astype(int)) >= 0).all()


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i2", "u1"])
@pytest.mark.parametrize("spread", [0.001, 3, 500])
def test_large_images_are_stretched_by_a_table(dtype, spread):
    """With the same result as for values of other types."""
    rng = np.random.default_rng(0)
    for size in (131_073, 140_001, 200_000):
        values = rng.normal(100, spread, size).clip(0, 30_000).astype(dtype)
        values[0] = 120
        np.testing.assert_array_equal(
            stretch_to_8_bits(values), stretch_to_8_bits(values.astype(np.int64))
        )


def test_few_bright_pixels_on_a_constant_image_stay_visible():
    values = np.full((100, 100), 7)
    values[3, 4:6] = 107, 207
    stretched = stretch_to_8_bits(values)
    assert stretched[3, 3:6].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [0.0, 255.0, -3.5, np.nan, np.inf])
def test_a_constant_image_is_uniform(value):
    assert len(np.unique(stretch_to_8_bits(np.full((3, 4), value)))) == 1


def test_nan_and_infinity():
    values = np.array([[0.0, 0.25, 1.0, np.nan, np.inf, -np.inf]])
    stretched = stretch_to_8_bits(values)
    assert stretched.tolist() == [[0, 64, 255, 0, 255, 0]]


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", ".webp"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
    first, second = (Image.new("RGB", (5, 4), color) for color in ("black", "white"))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    assert not read_image(tmp_path / f"a{suffix}").any()


def read_error(path):
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert str(path) in str(raised.value)
    assert raised.value.path == str(path)
    return raised.value.kind


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".webp"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    colors().save(path)
    complete = path.read_bytes()
    for share in (0.02, 0.3, 0.7, 0.9):
        path.write_bytes(complete[: int(share * len(complete))])
        assert read_error(path) == "image_broken", share


def test_damaged_files_are_read_or_refused(tmp_path):
    """Any bytes give an image or an ImageError, and no file stays open."""
    rng = np.random.default_rng(0)
    num_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    kinds = []
    for suffix in (".jpg", ".png", ".gif", ".bmp", ".tif", ".webp"):
        path = tmp_path / f"a{suffix}"
        colors().save(path)
        complete = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(complete)
            # Half of the damage is in the header, where it matters most.
            for end in (60, len(complete)):
                damaged[rng.integers(min(end, len(complete)))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                pixels = read_image(path)
            except ImageError as error:
                kinds.append(error.kind)
            else:
                assert pixels.dtype == np.uint8
                assert pixels.shape[2:] == (3,)
    assert 20 < len(kinds) < 140
    assert set(kinds) == {"image_broken"}
    if num_open is not None:
        assert len(os.listdir("/proc/self/fd")) == num_open


def test_other_files_than_images(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image\n" * 100)
    (tmp_path / "folder.jpg").mkdir()
    for name in ("empty.jpg", "text.jpg", "folder.jpg"):
        assert read_error(tmp_path / name) == "image_broken"
    for name in ("none.jpg", "none/a.jpg", "text.jpg/a.jpg"):
        assert read_error(tmp_path / name) == "image_missing"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes (POSIX)")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert read_error(tmp_path / "pipe.png") == "image_broken"


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_a_huge_stated_size_is_refused(tmp_path, side):
    path = tmp_path / "bomb.png"
    colors().save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    assert read_error(path) == "image_broken"


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    """PIL warns above its limit, and refuses above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    colors().save(tmp_path / "a.png")  # 864 pixels
    assert read_image(tmp_path / "a.png").shape == (24, 36, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert read_error(tmp_path / "a.png") == "image_broken"


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "no memory"), OSError(errno.EMFILE, "files")]
)
def test_an_error_of_the_process_is_none_of_the_image(tmp_path, monkeypatch, error):
    """Else a run with too little memory would replace its images by others."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")

    def fail(*args):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for read in (lambda: read_image(tmp_path / "a.png"), lambda: image_to_rgb(image)):
        with pytest.raises(type(error)) as raised:
            read()
        assert raised.value is error


def test_image_errors_can_be_pickled():
    error = ImageError("image_broken", Path("a b.jpg"), "is not an image")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ValueError)
    assert (again.kind, again.path) == ("image_broken", "a b.jpg")
    assert str(again) == "a b.jpg is not an image."
