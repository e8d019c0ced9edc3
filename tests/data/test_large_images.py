"""Images that are read by parts: the same pixels as of `read_image`, and bounded memory."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from tensormask.data import large_images
from tensormask.data.images import ImageError, read_image
from tensormask.data.large_images import open_large_image
from tensormask.utils.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (70, 90, 3), dtype=np.uint8)
DEEP = (RNG.gamma(2, 800, (70, 90))).astype(np.uint16)
TILED = {"tile": (16, 32)}


def assert_same_parts(large, rgb):
    assert large.size == rgb.shape[:2]
    for y0, y1, x0, x1 in ((0, *rgb.shape[:1], 0, rgb.shape[1]), (3, 40, 31, 77), (64, 70, 80, 90)):
        np.testing.assert_array_equal(large.read(y0, y1, x0, x1), rgb[y0:y1, x0:x1])


@pytest.mark.parametrize(
    "values, options",
    [
        (RGB, {}),  # one block, by a memory map
        (RGB, {"bigtiff": True, "byteorder": ">"}),
        (DEEP, {"byteorder": ">"}),
        (RGB, {"rowsperstrip": 16}),
        (RGB, {"rowsperstrip": 16, "compression": "zlib", "predictor": True}),
        (RGB, {"planarconfig": "separate"}),
        (RGB, {"planarconfig": "separate", "compression": "zlib", **TILED}),
        (RGB, {**TILED, "compression": "zlib"}),
        (RGB[..., 0], TILED),
        (DEEP, {**TILED, "compression": "zlib"}),
        (np.stack([DEEP, DEEP // 2, DEEP * 2], 2), {"photometric": "rgb", **TILED}),
        (RGB[..., 1].astype(np.float32) / 255, TILED),
    ],
)
def test_tiffs_by_parts_are_as_read_whole(tmp_path, values, options):
    kind = {"photometric": "rgb"} if values.ndim == 3 else {"photometric": "minisblack"}
    shaped = values
    if options.get("planarconfig") == "separate":
        shaped = np.moveaxis(values, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", shaped, **(kind | options))
    large = open_large_image(tmp_path / "a.tif")
    whole = values if values.dtype == np.uint8 else None
    rgb = read_image(tmp_path / "a.tif") if whole is None or whole.ndim == 2 else whole
    assert_same_parts(large, rgb)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_slides_compressed_as_jpeg(tmp_path, photometric):
    pytest.importorskip("imagecodecs", reason="the extra large-images")
    smooth = np.asarray(Image.fromarray(RGB[:7, :9]).resize((90, 70), Image.Resampling.BICUBIC))
    options = {"photometric": photometric, "compression": "jpeg", "tile": (32, 32)}
    tifffile.imwrite(tmp_path / "a.tif", smooth, **options)
    assert_same_parts(open_large_image(tmp_path / "a.tif"), read_image(tmp_path / "a.tif"))


def test_what_is_not_read_by_parts_is_read_whole(tmp_path):
    """Palettes, an orientation, and other formats; the pixels are those of `read_image`."""
    Image.fromarray(RGB).save(tmp_path / "a.png")
    Image.fromarray(RGB).convert("P").save(tmp_path / "palette.tif")
    Image.fromarray(RGB).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    Image.fromarray(RGB[..., 0] > 90).save(tmp_path / "bits.tif")
    for name in ("a.png", "palette.tif", "turned.tif", "bits.tif"):
        assert_same_parts(open_large_image(tmp_path / name), read_image(tmp_path / name))


def test_arrays_and_memory_maps(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    assert_same_parts(open_large_image(tmp_path / "a.npy"), RGB)
    assert_same_parts(open_large_image(np.load(tmp_path / "a.npy", mmap_mode="r")), RGB)
    assert_same_parts(open_large_image(RGB[..., ::-1], "BGR"), RGB)
    assert_same_parts(open_large_image(np.dstack([RGB, RGB[..., :1]])), RGB)  # alpha is dropped
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    assert_same_parts(open_large_image(DEEP), read_image(tmp_path / "deep.png"))


def test_thumbnails_are_means_of_blocks(monkeypatch):
    values = np.zeros((5, 7), np.uint8)
    values[:2, :2] = [[100, 200], [0, 100]]
    values[4, 6] = 40
    for band in (1, 1 << 20):  # rows that are read at once have no influence
        monkeypatch.setattr("tensormask.data.large_images._BAND_BYTES", band)
        small, factor = open_large_image(values).thumbnail(4)
        assert (factor, small.shape) == (2, (3, 4, 3))
        assert [small[0, 0, 0], small[2, 3, 0], small[1, 1, 0]] == [100, 40, 0]
        same, factor = open_large_image(values).thumbnail(7)
        assert factor == 1
        np.testing.assert_array_equal(same[..., 1], values)


def test_decoded_parts_in_memory_are_limited(tmp_path, monkeypatch):
    """A part is decoded once for neighboring tiles, as long as there is room for it."""
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib", **TILED)
    part = 16 * 32 * 3
    monkeypatch.setattr("tensormask.data.large_images._CACHED_BYTES", 2 * part)
    decoded, put = [], large_images._Segments.put
    monkeypatch.setattr(
        large_images._Segments, "put", lambda *args: decoded.append(args[1]) or put(*args)
    )
    large = open_large_image(tmp_path / "a.tif")
    assert_same_parts(large, RGB)
    assert large._read.__self__._cache._block.nbytes == 2 * part
    decoded.clear()
    for y0, x0 in ((0, 0), (0, 16), (0, 32), (0, 48), (0, 0)):  # tiles 0, 0, 1, 1, 0
        large.read(y0, y0 + 16, x0, x0 + 16)
    assert decoded == [0, 1]
    large.read(16, 32, 0, 16)  # drops tile 1
    large.read(0, 16, 32, 64)
    large.read(0, 16, 0, 16)
    assert decoded[2:] == [decoded[2], 1, 0]


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((4, 5, 8), np.uint8), r"shape \(4, 5, 8\).*1 to 4 channels"),
        (np.zeros((4, 5), np.int32), "values of int32.*convert"),
        (np.full((4, 5), 7.0), "values from 7 to 7"),
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\)"),
    ],
)
def test_other_values_are_refused(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    for image in (values, tmp_path / "a.npy"):
        with pytest.raises(UserError, match=message):
            open_large_image(image).read(0, 1, 0, 1)


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"million pixels.*vips tiffsave a.png a.tif --tile"):
        open_large_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="does not exist"):
        open_large_image(tmp_path / "none.tif")
    for name in ("text.tif", "text.npy"):
        (tmp_path / name).write_text("no image")
        with pytest.raises(ImageError):
            open_large_image(tmp_path / name)
    cut = tmp_path / "cut.tif"
    tifffile.imwrite(cut, RGB, photometric="rgb", compression="zlib", **TILED)
    content = bytearray(cut.read_bytes())
    with tifffile.TiffFile(cut) as tif:
        start = tif.pages[0].dataoffsets[1]
    content[start : start + 40] = b"x" * 40
    cut.write_bytes(content)
    with pytest.raises(ImageError, match="cannot be read"):
        open_large_image(cut).read(0, 70, 0, 90)
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib")
    monkeypatch.setattr("tensormask.data.large_images._MAX_SEGMENT_BYTES", 1000)
    with pytest.raises(UserError, match=r"strips of .* convert it"):
        open_large_image(tmp_path / "a.tif")
