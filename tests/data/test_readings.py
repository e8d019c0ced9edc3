"""One image, one reading: a file by its path, by PIL and as an array gives the same pixels."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from fuzz import fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tensormask.data.arrays import image_to_rgb
from tensormask.data.decoding import deep_colors
from tensormask.data.images import ImageError, read_image, stretch_to_8_bits

# Mode of PIL, suffix of a file that keeps it, and the type of its values.
FILES = (
    *(("1", s, "?") for s in (".png", ".tif", ".bmp", ".gif")),
    *(("L", s, "u1") for s in (".png", ".tif", ".bmp", ".webp")),
    *((mode, s, "u1") for mode in ("LA", "RGBA", "RGB") for s in (".png", ".tif")),
    *(("I;16", s, "u2") for s in (".png", ".tif", ".pgm", ".jp2")),
    *(("I;16B", ".tif", ">u2"), ("I", ".tif", "i4"), ("F", ".tif", "f4"), ("F", ".pfm", "f4")),
)
CHANNELS = {"LA": 2, "RGB": 3, "RGBA": 4}
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_values(seed, shape, dtype):
    """Values in a random part of the range of their type."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(0, 1, shape).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return rng.random(shape) < 0.5
    limits = np.iinfo(dtype)
    low, high = sorted(int(x) for x in rng.integers(limits.min, limits.max, 2, endpoint=True))
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


def readings(path):
    """The pixels of a file, by every way to give it."""
    with Image.open(path) as named, Image.open(path) as loaded:
        in_memory = Image.open(io.BytesIO(path.read_bytes()))
        loaded.load()
        return {
            "path": read_image(path),
            "PIL": image_to_rgb(named),
            "PIL, for the second time": image_to_rgb(named),
            "PIL, loaded before": image_to_rgb(loaded),
            "PIL, a file in memory": image_to_rgb(in_memory),
            "PIL, a file in memory, for the second time": image_to_rgb(in_memory),
        }


def assert_all_equal(found, expected):
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected, name)
        assert pixels.flags.c_contiguous, name


@pytest.mark.parametrize("mode, suffix, dtype", FILES, ids=lambda x: str(x))
def test_path_pil_and_array_are_equal(tmp_path, mode, suffix, dtype):
    try:
        Image.new(mode, (32, 32)).save(tmp_path / f"a{suffix}")
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"not written by this PIL: {error}")

    @settings(max_examples=fuzz_examples(8), deadline=None)
    @given(st.integers(0, 2**32), sizes)
    def check(seed, size):
        if suffix == ".jp2":
            size = tuple(32 * side for side in size)
        shape = (*size, CHANNELS[mode]) if mode in CHANNELS else size
        values = random_values(seed, shape, dtype)
        image = Image.fromarray(values)
        assert image.mode == mode
        options = {".webp": {"lossless": True}}.get(suffix, {})
        image.save(tmp_path / f"a{suffix}", **options)
        expected = image_to_rgb(values)
        assert_all_equal(
            readings(tmp_path / f"a{suffix}") | {"in memory": image_to_rgb(image)}, expected
        )

    check()


@settings(max_examples=fuzz_examples(16), deadline=None)
@given(
    st.integers(0, 2**32),
    sizes,
    st.sampled_from([".png", ".tif", ".ppm", ".pgm", ".jp2"]),
    st.sampled_from([3, 4]),
    st.sampled_from([4095, 1023, 65535, 200]),
)
def test_colors_of_16_bits(tmp_path_factory, seed, size, suffix, num_channels, highest):
    """Files of OpenCV; PIL alone keeps the upper 8 bits: of 12 bits nearly nothing."""
    path = tmp_path_factory.mktemp("deep") / f"a{suffix}"
    num_channels = {".ppm": 3, ".jp2": 3, ".pgm": 1}.get(suffix, num_channels)
    if suffix == ".jp2":  # OpenCV's encoder refuses small ones
        size = tuple(32 * side for side in size)
    values = random_values(seed, (*size, num_channels), "u2") // (65536 // (highest + 1))
    if suffix in (".ppm", ".pgm"):
        kind = {3: "P6", 1: "P5"}[num_channels]
        header = f"{kind} {size[1]} {size[0]} {max(highest, 256)}\n".encode()
        path.write_bytes(header + values[..., ::-1].astype(">u2").tobytes())
        values = values[..., 0] if num_channels == 1 else values
    else:
        assert cv2.imwrite(str(path), values)
    read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if suffix == ".jp2":  # OpenCV's encoder loses some
        values = read
    np.testing.assert_array_equal(read, values)
    expected = image_to_rgb(values if num_channels == 1 else values[..., 2::-1])
    found = readings(path) | {"array": image_to_rgb(values, "BGR")}
    assert_all_equal(found, expected)


@pytest.mark.parametrize("mode", ["P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"])
def test_other_modes_of_pil(tmp_path, mode):
    """By path where a TIFF can have the mode."""
    rgba = Image.fromarray(random_values(1, (6, 8, 4), "u1"))
    image = {
        "LAB": lambda: Image.merge("LAB", rgba.split()[:3]),
        "La": lambda: rgba.convert("LA").convert("La"),
        "RGBa": lambda: rgba.convert("RGBa"),
        "P": lambda: rgba.quantize(8),
        "PA": lambda: rgba.convert("RGB").quantize(8).convert("PA"),
    }.get(mode, lambda: rgba.convert("RGB").convert(mode))()
    assert image.mode == mode
    rgb = image_to_rgb(image)
    expected = image.convert("LA") if mode == "La" else image
    np.testing.assert_array_equal(rgb, np.asarray(expected.convert("RGB")))
    try:
        image.save(tmp_path / "a.tif")
    except (OSError, KeyError):
        return
    with Image.open(tmp_path / "a.tif") as image:
        is_kept = image.mode == mode
    if is_kept:
        assert_all_equal(readings(tmp_path / "a.tif"), rgb)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 80, 10))])
def test_palettes_with_transparency(tmp_path, transparency):
    image = Image.fromarray(random_values(1, (6, 8, 3), "u1")).quantize(8)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert_all_equal(readings(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(tmp_path, suffix, deep, orientation):
    """PIL images are rotated as their files are, with 8 bits and more."""
    if deep and suffix in (".jpg", ".webp"):
        return
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = random_values(2, (4, 6, 3), "u1")
    Image.fromarray(values).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    if deep:
        with_exif = path.read_bytes()
        cv2.imwrite(str(path), values[..., ::-1].astype(np.uint16) * 16)
        content = path.read_bytes()
        if suffix == ".png":  # the chunk eXIf after IHDR
            start = with_exif.index(b"eXIf") - 4
            size = 12 + int.from_bytes(with_exif[start : start + 4], "big")
            path.write_bytes(content[:33] + with_exif[start : start + size] + content[33:])
        else:
            path.write_bytes(with_orientation(content, orientation))
        expected = stretch_to_8_bits(expected.astype(int))
    assert_all_equal(readings(path), expected)


def with_orientation(tiff, orientation):
    """Turn the tag of the planar configuration, 284, which is 1 anyway, into the orientation."""
    old = (284).to_bytes(2, "little") + b"\x03\0\x01\0\0\0\x01\0"
    assert tiff.count(old) == 1
    return tiff.replace(
        old, (274).to_bytes(2, "little") + b"\x03\0\x01\0\0\0" + bytes([orientation, 0])
    )


def write_deep(path, values):
    """Write uint16 RGB."""
    assert cv2.imwrite(str(path), values[..., ::-1])


def test_opencv_prints_nothing(tmp_path, capfd):
    """It warns of TIFF files with alpha, and of those that it cannot read."""
    path = tmp_path / "a.tif"
    assert cv2.imwrite(str(path), random_values(3, (4, 6, 4), "u2"))
    capfd.readouterr()
    level = deep_colors._LOGGING.getLogLevel()
    read_image(path)
    assert capfd.readouterr().err == ""
    assert deep_colors._LOGGING.getLogLevel() == level > 0


def test_an_image_that_was_changed_is_not_read_again(tmp_path):
    values = random_values(3, (4, 6, 3), "u2")
    write_deep(tmp_path / "a.png", values)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        image.putpixel((0, 0), (1, 2, 3))
        rgb = image_to_rgb(image)
        assert rgb[0, 0].tolist() == [1, 2, 3]
        np.testing.assert_array_equal(rgb, np.asarray(image))
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        for replace in (lambda path: path.write_bytes(b"other"), lambda path: path.unlink()):
            replace(tmp_path / "a.png")
            np.testing.assert_array_equal(image_to_rgb(image), np.asarray(image))


def test_pages_of_deep_colors(tmp_path):
    """The page that an image of PIL is at; by path the first one."""
    pages = [random_values(seed, (4 + seed, 6, 3), "u2") for seed in range(3)]
    path = tmp_path / "a.tif"
    assert cv2.imwritemulti(str(path), [page[..., ::-1] for page in pages])
    np.testing.assert_array_equal(read_image(path), stretch_to_8_bits(pages[0]))
    with Image.open(path) as image:
        for number in (2, 0, 1):
            image.seek(number)
            for _ in range(2):
                np.testing.assert_array_equal(image_to_rgb(image), stretch_to_8_bits(pages[number]))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
def test_deep_colors_that_end_early(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_deep(path, random_values(3, (40, 60, 3), "u2"))
    complete = path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(complete[: int(share * len(complete))])
        with pytest.raises(ImageError) as raised:
            read_image(path)
        assert raised.value.kind == "image_broken"


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 4000), (2, 2), (0, 255)])
@pytest.mark.parametrize("hole", [None, np.nan, np.inf])
def test_files_of_other_floats_are_stretched(tmp_path, low, high, hole):
    """As the call does that the error for the same array gives."""
    values = np.linspace(low, high, 24, dtype=np.float32).reshape(4, 6)
    if hole is not None:
        values[1, 2] = hole
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.repeat(stretch_to_8_bits(values)[..., None], 3, axis=2)
    assert_all_equal(readings(tmp_path / "a.tif"), expected)
    with pytest.raises(ValueError, match="give "):
        image_to_rgb(values)


def test_floats_that_are_not_finite_in_a_file(tmp_path):
    values = np.array([[0.2, np.nan], [np.inf, -np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.repeat(np.array([[51, 0], [255, 0]])[..., None], 3, axis=2)
    assert_all_equal(readings(tmp_path / "a.tif"), expected)


def test_unsigned_integers_of_32_bits(tmp_path):
    """PIL reads them as signed ones."""
    values = np.array([[0, 2**31 - 1], [2**31, 2**32 - 1]], np.uint32)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert content.count(signed) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(signed, unsigned))
    assert_all_equal(readings(tmp_path / "a.tif"), image_to_rgb(values))
    values = np.array([[-5, 0], [7, 9]], np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert_all_equal(readings(tmp_path / "a.tif"), image_to_rgb(values))


@pytest.mark.parametrize("highest", [200, 4095, 65535])
def test_grey_of_16_bits_with_alpha(tmp_path, highest):
    values = random_values(4, (5, 7, 2), "u2") // (65536 // (highest + 1))
    header = struct.pack(">IIBBBBB", 7, 5, 16, 4, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert_all_equal(readings(tmp_path / "a.png"), image_to_rgb(values))


@pytest.mark.parametrize("num_colors", [1, 3])
@pytest.mark.parametrize("value", [0, 300, 65535])
def test_constant_images_are_black(tmp_path, num_colors, value):
    values = np.full((4, 6, num_colors), value, np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), values)
    assert_all_equal(readings(tmp_path / "a.png"), np.zeros((4, 6, 3)))
    assert not image_to_rgb(values).any()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
@pytest.mark.parametrize("suffix", [".gif", ".tif"])
def test_frames(tmp_path, mode, suffix):
    """By path the first one; of PIL that at which the image is."""
    if suffix == ".gif" and mode == "I;16":
        return
    frames = [Image.fromarray(random_values(seed, (5, 7, 3), "u1")) for seed in range(3)]
    if mode == "I;16":
        frames = [Image.fromarray(random_values(seed, (5, 7), "u2")) for seed in range(3)]
    elif mode == "P":
        frames = [frame.quantize(8) for frame in frames]
    else:
        frames = [frame.convert(mode) for frame in frames]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert_all_equal(readings(path), image_to_rgb(image))
        image.seek(1)
        assert not np.array_equal(image_to_rgb(image), read_image(path))
