"""Images that are read by parts, so that they can be larger than memory.

- TIFF, BigTIFF among them: by its tiles or strips (package tifffile), or by a memory map if it is
  not compressed. Only the first page is read, which is the full resolution of a pyramid.
- `.npy` of NumPy: by a memory map.
- Arrays in memory.

Others, such as PNG and JPEG, cannot be read by parts: they are read whole, and so are kinds of
TIFF with palettes, of 1 bit, or turned by their orientation. The pixels are those of `read_image`.

Letters: (H, W) the image, C channels, (h, w) a part.
"""

import logging
import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tensormask.data.arrays import image_to_rgb
from tensormask.data.decoding.pixels import stretching_table, values_to_rgb
from tensormask.data.images import ImageError, read_image
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.utils.files import expand_home

logger = logging.getLogger(__name__)

Reader = Callable[[int, int, int, int], np.ndarray]  # y0, y1, x0, x1 to values (h, w) or (h, w, C)

TIFF_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".btf", ".tf8")
MAX_WHOLE_PIXELS = 178_956_970  # PIL refuses more: twice PIL.Image.MAX_IMAGE_PIXELS
_ORIENTATION_TAG = 274
_JPEG_COMPRESSIONS = (6, 7, 33007, 34892)
_CACHED_BYTES = 128 << 20  # of decoded strips or tiles of a TIFF
_BAND_BYTES = 32 << 20  # read at once where the whole image is needed
_MAX_SEGMENT_BYTES = 512 << 20


class LargeImage:
    """An image `(H, W)` that is read by parts, as 8-bit RGB.

    Integers of 16 bits are stretched over the range of all pixels, as `read_image` does, which
    takes one more pass over the image; floating values are 0..1.

    Args:
        name: for messages.
        shape: `(H, W)`, or `(H, W, C)` with the channels of `values_to_rgb`.
        dtype: of the values: uint8, bool, integers of 16 bits, or floating.
        read: returns the values of a part, from `(y0, y1, x0, x1)`.

    Raises:
        UserError: other channels or values.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Reader
    ) -> None:
        channels = shape[2] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in shape:
            raise UserError(
                f"{name} has the shape {tuple(shape)}; expected (H, W) or (H, W, C) of 1 to 4 "
                "channels: write the three that are to be seen to a file of their own"
            )
        if not (dtype.kind in "bf" or (dtype.kind in "iu" and dtype.itemsize <= 2)):
            raise UserError(
                f"{name} has values of {dtype}; an image that is read by parts has 8 or 16 bits, "
                "or floating values in 0..1: convert it"
            )
        self.name = name
        self.size: tuple[int, int] = (shape[0], shape[1])
        self._dtype = dtype
        self._bytes_of_row = shape[1] * channels * dtype.itemsize
        self._read = read
        self._table: tuple[int, np.ndarray] | None = None  # lowest value, and 8 bits of each
        self._checked = dtype.kind != "f"

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Return a part as uint8 RGB `(y1 - y0, x1 - x0, 3)`.

        Raises:
            UserError: floating values outside of 0..1 anywhere in the image.
        """
        if not self._checked:
            for band in self._bands():
                self._to_rgb(band)
            self._checked = True
        if self._dtype.kind in "iu" and self._dtype.itemsize == 2 and self._table is None:
            self._table = stretching_table(self._color_bands(), self._dtype)
        return self._to_rgb(self._read(y0, y1, x0, x1))

    def thumbnail(self, max_side: int) -> tuple[np.ndarray, int]:
        """Return a small RGB image, and the whole factor by which its sides are divided."""
        height, width = self.size
        factor = -(-max(height, width) // max_side)
        parts = []
        step = max(1, _BAND_BYTES // self._bytes_of_row // factor) * factor
        for y in range(0, height, step):
            band = self.read(y, min(y + step, height), 0, width)
            bottom, right = -len(band) % factor, -width % factor
            band = cv2.copyMakeBorder(band, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
            size = (band.shape[1] // factor, band.shape[0] // factor)
            parts.append(cv2.resize(band, size, interpolation=cv2.INTER_AREA))
        return np.concatenate(parts), factor

    def _to_rgb(self, values: np.ndarray) -> np.ndarray:
        if self._table is not None:
            lowest, table = self._table
            values = table[values.astype(np.int64) - lowest]
        try:
            return values_to_rgb(values)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def _bands(self) -> Iterator[np.ndarray]:
        height, width = self.size
        step = max(1, _BAND_BYTES // self._bytes_of_row)
        for y in range(0, height, step):
            yield self._read(y, min(y + step, height), 0, width)

    def _color_bands(self) -> Iterator[np.ndarray]:
        for band in self._bands():
            yield band[:, :, : 1 if band.shape[2] < 3 else 3] if band.ndim == 3 else band


def open_large_image(image: Any, channel_order: str = "RGB") -> LargeImage:
    """Return an image for reading by parts.

    Args:
        image: the path of a file, or what `image_to_rgb` takes. An array may be a `numpy.memmap`.
        channel_order: of arrays and tensors.

    Raises:
        UserError: an image that is not valid, or too large to be read whole, which says what to do.
        ImageError: the file does not exist or is not an image.
    """
    if isinstance(image, np.ndarray) and channel_order == "RGB":
        return LargeImage("the image", image.shape, image.dtype, _reader_of(image))
    if not isinstance(image, str | os.PathLike):
        return _of_rgb("the image", image_to_rgb(image, channel_order))
    path = Path(expand_home(image))
    if not path.is_file():
        return _of_rgb(str(path), read_image(path))  # which says what is wrong
    if path.suffix.lower() == ".npy":
        return _open_npy(path)
    if path.suffix.lower() in TIFF_SUFFIXES:
        opened = _open_tiff(path)
        if opened is not None:
            return opened
    return _read_whole(path)


def _of_rgb(name: str, rgb: np.ndarray) -> LargeImage:
    return LargeImage(name, rgb.shape, rgb.dtype, _reader_of(rgb))


def _reader_of(values: np.ndarray) -> Reader:
    return lambda y0, y1, x0, x1: np.array(values[y0:y1, x0:x1])


def _read_whole(path: Path) -> LargeImage:
    try:
        rgb = read_image(path)
    except ImageError as error:
        if "decompression bomb" in error.reason or "exceeds limit" in error.reason:
            raise ImageError(
                error.kind,
                error.path,
                f"has more than the {MAX_WHOLE_PIXELS // 10**6} million pixels that can be read "
                "whole. TIFF is read by parts: convert it, as in "
                f"`vips tiffsave {path.name} {path.stem}.tif --tile --bigtiff --compression "
                "deflate`",
            ) from None
        raise
    if rgb.nbytes > _CACHED_BYTES:
        logger.info("%s is read whole, with %d MB; TIFF is read by parts", path, rgb.nbytes >> 20)
    return _of_rgb(str(path), rgb)


def _open_npy(path: Path) -> LargeImage:
    def mapped() -> np.ndarray:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    try:
        values = mapped()
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ImageError("image_broken", path, f"cannot be read: {error}") from error

    # A new map for each part: pages of an old one stay in the process.
    def read(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return np.array(mapped()[y0:y1, x0:x1])

    return LargeImage(str(path), values.shape, values.dtype, read)


def _open_tiff(path: Path) -> LargeImage | None:
    """Return the first page of a TIFF; None if its kind is to be read whole."""
    tifffile = require("tifffile", extra="large-images")
    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[0]
            kind = _TiffReader(path, page)
            jpeg = page.compression in _JPEG_COMPRESSIONS
            plain = page.photometric in ((1, 2, 6) if jpeg else (1, 2))
            plain &= page.tags.valueof(_ORIENTATION_TAG, default=1) == 1
            bits = page.dtype is not None and page.dtype.itemsize * 8 == page.bitspersample
            if not plain or not bits or page.imagedepth != 1:
                return None
            shape, dtype = kind.shape, page.dtype
    except tifffile.TiffFileError as error:
        raise ImageError("image_broken", path, f"cannot be read: {error}") from error
    return LargeImage(str(path), shape, np.dtype(dtype), kind.read)


class _TiffReader:
    """Reads parts of the first page of a TIFF, and keeps the last decoded tiles or strips."""

    def __init__(self, path: Path, page: Any) -> None:
        self._path = path
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
        self._step = (
            (page.tilelength, page.tilewidth)
            if page.is_tiled
            else (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        )
        self._planes = planes
        self._mapped = page.is_memmappable and page.is_contiguous and not page.is_tiled
        size = self._step[0] * self._step[1] * page.samplesperpixel * page.bitspersample // 8
        if not self._mapped and size > _MAX_SEGMENT_BYTES:
            raise UserError(
                f"{path} is compressed in strips of {size >> 20} MB, which cannot be read by "
                f"parts: convert it, as in `vips tiffsave {path.name} tiled.tif --tile --bigtiff "
                "--compression deflate`"
            )
        self._cache = _Segments(self._step, planes * self._grid()[0] * self._grid()[1])

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        tifffile = require("tifffile", extra="large-images")
        with tifffile.TiffFile(self._path) as tif:
            page = tif.pages[0]
            if self._mapped:
                offset, dtype = page.dataoffsets[0], np.dtype(tif.byteorder + page.dtype.char)
                shape = self.shape if self._planes == 1 else (self._planes, *self.shape[:2])
                values = np.memmap(self._path, dtype, "r", offset, shape)
                values = values if self._planes == 1 else np.moveaxis(values, 0, 2)
                return values[y0:y1, x0:x1].astype(page.dtype)
            part = np.zeros((y1 - y0, x1 - x0, self.shape[2]), page.dtype)
            (height, width), (rows, columns) = self._step, self._grid()
            for row in range(y0 // height, -(-y1 // height)):
                for column in range(x0 // width, -(-x1 // width)):
                    for plane in range(self._planes):
                        segment = self._segment(page, (plane * rows + row) * columns + column)
                        top, left = row * height - y0, column * width - x0
                        ys, xs = max(top, 0), max(left, 0)
                        inside = segment[ys - top : y1 - y0 - top, xs - left : x1 - x0 - left]
                        target = part[ys : ys + inside.shape[0], xs : xs + inside.shape[1]]
                        target[:, :, plane if self._planes > 1 else slice(None)] = (
                            inside[:, :, 0] if self._planes > 1 else inside
                        )
        return part

    def _grid(self) -> tuple[int, int]:
        return -(-self.shape[0] // self._step[0]), -(-self.shape[1] // self._step[1])

    def _segment(self, page: Any, index: int) -> np.ndarray:
        """Return a decoded tile or strip `(h, w, C)`."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        handle = page.parent.filehandle
        size = page.databytecounts[index]
        data = None
        if size:
            handle.seek(page.dataoffsets[index])
            data = handle.read(size)
        try:
            options = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
            decoded, _, shape = page.decode(data, index, **options)
        except Exception as error:  # codecs fail in many ways
            hint = ""
            if "imagecodecs" in str(error):
                hint = ": pip install 'tensormask[large-images]'"
            raise ImageError(
                "image_broken", self._path, f"cannot be read: {str(error).rstrip('.')}{hint}"
            ) from error
        if decoded is None:  # a part without data
            decoded = np.full(shape, page.nodata, page.dtype)
        return self._cache.put(index, decoded[0])


class _Segments:
    """The last decoded tiles or strips, in one block of memory.

    Each in its own, they would lie between the tensors of a model, and keep freed memory apart.

    Args:
        sides: rows and columns of the largest.
        number: of all.
    """

    def __init__(self, sides: tuple[int, int], number: int) -> None:
        self._sides, self._number = sides, number
        self._block = np.empty(0)
        self._slots: OrderedDict[int, tuple[int, tuple[int, ...]]] = OrderedDict()  # and shape

    def get(self, index: int) -> np.ndarray | None:
        """Return a segment `(h, w, C)`, valid until the next is put; None if it is not there."""
        if index not in self._slots:
            return None
        self._slots.move_to_end(index)
        slot, (height, width, _) = self._slots[index]
        return self._block[slot, :height, :width]

    def put(self, index: int, segment: np.ndarray) -> np.ndarray:
        """Keep and return a segment; the one that was not asked for the longest is dropped."""
        if not self._slots:
            shape = (*self._sides, segment.shape[2])
            most = _CACHED_BYTES // (math.prod(shape) * segment.itemsize)
            self._block = np.empty((min(self._number, max(1, most)), *shape), segment.dtype)
        full = len(self._slots) == len(self._block)
        slot = self._slots.popitem(last=False)[1][0] if full else len(self._slots)
        self._slots[index] = slot, segment.shape
        self._block[slot, : segment.shape[0], : segment.shape[1]] = segment
        return self._block[slot, : segment.shape[0], : segment.shape[1]]
