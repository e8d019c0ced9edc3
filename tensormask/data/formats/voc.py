"""Pascal VOC's masks: `SegmentationObject`, one number an object, and `SegmentationClass`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from tensormask.data.formats.regions import number_image_to_rles
from tensormask.data.formats.source import Source
from tensormask.data.images import image_suffixes
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import read_text

OBJECTS, CLASSES = "SegmentationObject", "SegmentationClass"
_VOID, _UNKNOWN = 255, -1
_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def find_voc(path: Path) -> Path | None:
    """Return the folder that holds `SegmentationObject`, at most two levels below a path."""
    for pattern in (OBJECTS, f"*/{OBJECTS}", f"*/*/{OBJECTS}"):
        if found := sorted(p for p in path.glob(pattern) if p.is_dir()):
            return found[0].parent
    return None


def read_voc(path: Path, source: Source) -> None:
    """Read the masks of a folder such as `VOC2012`; 255, the border of objects, belongs to none.

    An object has the class of most of its pixels. The names of the classes are those of
    `labelmap.txt` (`name:r,g,b::`, as CVAT and datumaro write it), of `source.class_names`, or
    VOC's. Splits are those of `ImageSets/Segmentation`.

    Raises:
        UserError: there are no masks of objects, or `labelmap.txt` is broken.
    """
    root = find_voc(path)
    if root is None:
        raise UserError(f"{path} has no folder {OBJECTS}: masks of classes alone have no objects")
    label_map = _read_label_map(root / "labelmap.txt")
    names = list(label_map) or source.class_names or list(_NAMES)
    source.class_names = names
    colors = list(label_map.values()) or [voc_color(n) for n in range(1, len(names) + 1)]
    numbers = {0: 0, voc_color(_VOID): _VOID} | {color: n for n, color in enumerate(colors, 1)}
    splits = _read_splits(root / "ImageSets" / "Segmentation")
    for mask_file in sorted((root / OBJECTS).glob("*.png")):
        where = source.where(mask_file)
        try:
            objects, classes = (_read_mask(root / f / mask_file.name) for f in (OBJECTS, CLASSES))
        except (UserError, OSError) as error:
            source.issues.add("file_malformed", where, str(error))
            continue
        stem = mask_file.stem
        if splits and stem not in splits:
            source.issues.add("image_unlabeled", where, "in no list of ImageSets")
            continue
        found = [p for s in sorted(image_suffixes()) for p in [root / "JPEGImages" / f"{stem}{s}"]]
        image_path = next((p for p in found if p.is_file()), None)
        if image_path is None:
            source.issues.add("image_missing", where, f"JPEGImages/{stem}.jpg")
            continue
        if objects.values.shape != classes.values.shape:
            source.issues.add("file_malformed", where, "two masks of different sizes")
            continue
        size = (objects.values.shape[0], objects.values.shape[1])
        image = source.add_image(image_path, where, split=splits.get(stem, ""), size=size)
        if image is None:
            continue
        values = objects.values
        values = np.where(values == (voc_color(_VOID) if objects.is_color else _VOID), 0, values)
        class_numbers = _class_numbers(classes, numbers, is_named_by_color=bool(label_map))
        for value, rle in number_image_to_rles(values):
            at = f"{where}:{value}"
            inside = class_numbers[values == value]
            inside = inside[(inside != 0) & (inside != _VOID)]
            found_numbers, counts = np.unique(inside, return_counts=True)
            number = int(found_numbers[counts.argmax()]) if len(counts) else 0
            if not 0 < number <= len(names):
                reason = "no class there" if number == 0 else f"{number}; give --classes"
                source.issues.add("class_unknown", at, reason)
                continue
            source.add_object(image, names[number - 1], [rle], at)


def voc_color(number: int) -> int:
    """Return the color, red * 65536 + green * 256 + blue, of a number in VOC's palette.

    Example:
        >>> hex(voc_color(1)), hex(voc_color(255))
        ('0x800000', '0xe0e0c0')
    """
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return channels[0] << 16 | channels[1] << 8 | channels[2]


class _Mask:
    """A mask: its values `(H, W)`, and what the palette makes of them, packed as `voc_color`."""

    def __init__(self, image: Image.Image) -> None:
        self.is_color = image.mode not in ("P", "L", "1", "I", "I;16")
        self.palette: np.ndarray | None = None
        if self.is_color:
            self.values = _packed(np.asarray(image.convert("RGB")))
            return
        if image.mode == "P":
            table = np.zeros((256, 3), np.uint8)
            given = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            table[: len(given)] = given
            self.palette = _packed(table)
        self.values = np.asarray(image).astype(np.int64)


def _packed(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _read_mask(path: Path) -> _Mask:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["PNG"]) as image:
                return _Mask(image)
    except FileNotFoundError:
        raise UserError(f"{path.parent.name}/{path.name} does not exist") from None
    except Exception as error:  # PIL fails in many ways on broken files
        raise UserError(f"cannot be read: {shorten(str(error))}") from None


def _class_numbers(mask: _Mask, numbers: dict[int, int], *, is_named_by_color: bool) -> np.ndarray:
    """Return the number of the class of each pixel, -1 for an unknown color."""
    found, inverse = np.unique(mask.values, return_inverse=True)
    values: list[int] = found.tolist()
    palette = mask.palette
    if mask.is_color:
        values = [numbers.get(color, _UNKNOWN) for color in values]
    elif palette is not None and is_named_by_color:
        colors = [int(palette[value]) for value in values]
        if all(color in numbers for color in colors):  # else the values count the lines
            values = [numbers[color] for color in colors]
    return np.array(values, np.int64)[inverse].reshape(mask.values.shape)


def _read_label_map(path: Path) -> dict[str, int]:
    """Return the packed color of each class but the background, in the order of the file.

    A class without a color has that of its line in VOC's palette.
    """
    colors: dict[str, int] = {}
    lines = read_text(path).splitlines() if path.is_file() else []
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    for number, line in enumerate(lines):
        name, _, rest = line.partition(":")
        values = rest.split(":")[0]
        try:
            red, green, blue = (int(value) for value in values.split(",")) if values else (0, 0, 0)
        except ValueError:
            raise UserError(f"{path}: {shorten(line)!r} is not name:red,green,blue::") from None
        if name != "background":
            colors[name] = red << 16 | green << 8 | blue if values else voc_color(number)
    return colors


def _read_splits(folder: Path) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split in ("train", "val", "test"):
        path = folder / f"{split}.txt"
        for line in read_text(path).splitlines() if path.is_file() else []:
            if name := line.strip():
                splits.setdefault(name, split)
    return splits
