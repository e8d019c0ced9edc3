#!/usr/bin/env python
"""Make the embedded data set `nuclei_train` and `nuclei_val`: `python dev/make_nuclei.py`.

The source is `../shared/data/nuclei_dsb2018`. Its images are taken in the order of their ids, until
each kind of microscopy has its number of crops of 256 x 256 px.

- A source image gives the crops with the most nuclei: one, or of brightfield, which has few images,
  up to three that do not overlap. Each has 8 to 50 nuclei, counted by the centers of their boxes.
- A nucleus that is cut keeps its visible part. Parts of less than 20 px, or less than 4 px wide or
  high, are left out.
- Crops start at multiples of 16 px, so that they have the same JPEG blocks as the source.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT.parent / "shared" / "data" / "nuclei_dsb2018"
PACKAGED = ROOT / "tensormask" / "data" / "nuclei"

SIZE = 256
NUM_CROPS = {
    "train": {"fluorescence": 92, "stained": 44, "brightfield": 24},
    "val": {"fluorescence": 23, "stained": 11, "brightfield": 6},
}
CROPS_PER_IMAGE = {"fluorescence": 1, "stained": 1, "brightfield": 3}
MIN_NUCLEI, MAX_NUCLEI = 8, 50
MIN_AREA, MIN_SIDE = 20, 4
# JPEG. The source has 88; the dark images of fluorescence would lose too much below.
QUALITY = {"fluorescence": 88, "stained": 75, "brightfield": 75}
ALIGNMENT = 16  # px: a JPEG block of 8 x 8 in color channels of half the resolution


def kind_of(pixels: np.ndarray) -> str:
    """Return the kind of microscopy of an image, uint8 `(H, W, 3)`, by its color and brightness."""
    if np.ptp(pixels, axis=2).mean() > 5:
        return "stained"
    return "fluorescence" if pixels.mean() < 100 else "brightfield"


def make_split(split: str, source: Path, output: Path) -> None:
    """Write `<split>.json` and `<split>/` of the embedded set to `output`."""
    content = json.loads((source / f"instances_{split}.json").read_text(encoding="utf-8"))
    nuclei_of = defaultdict(list)
    for annotation in content["annotations"]:
        nuclei_of[annotation["image_id"]].append(annotation)
    (output / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    num_missing = Counter(NUM_CROPS[split])
    for entry in content["images"]:
        image = Image.open(source / split / entry["file_name"]).convert("RGB")
        kind = kind_of(np.asarray(image))
        nuclei = nuclei_of[entry["id"]]
        boxes = np.array([nucleus["bbox"] for nucleus in nuclei])
        corners = find_crops(boxes, image.size, min(CROPS_PER_IMAGE[kind], num_missing[kind]))
        num_missing[kind] -= len(corners)
        left, top = entry["crop_xy"]
        for x, y in corners:
            image_id = len(images) + 1
            file_name = f"{image_id:03d}.jpg"
            crop = image.crop((x, y, x + SIZE, y + SIZE))
            crop = crop if kind == "stained" else crop.convert("L")
            crop.save(
                output / split / file_name, quality=QUALITY[kind], optimize=True, progressive=True
            )
            images.append(
                {"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE}
                | {"license": 1, "modality": kind}
                | {"dsb_image_id": entry["dsb_image_id"], "crop_xy": [left + x, top + y]}
            )
            for fields in cropped(nuclei, x, y):
                number = len(annotations) + 1
                annotations.append({"id": number, "image_id": image_id, "category_id": 1} | fields)
    if num_missing.total():
        raise ValueError(f"{split} in {source} lacks {dict(num_missing)} crops.")
    data = content | {"images": images, "annotations": annotations}
    data["info"]["description"] += f"; nuclei_{split}: crops of {SIZE} x {SIZE} px"
    text = json.dumps(data, separators=(",", ":"))
    (output / f"{split}.json").write_text(text, encoding="utf-8")


def find_crops(boxes: np.ndarray, size: tuple[int, int], num_crops: int) -> list[tuple[int, int]]:
    """Return corners (x, y) of the crops with the most nuclei, at most `num_crops`.

    Args:
        boxes: `(K, 4)` float, (x, y, width, height) in pixels.
        size: width and height of the image.
    """
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    corners = [
        (x, y)
        for y in range(0, size[1] - SIZE + 1, ALIGNMENT)
        for x in range(0, size[0] - SIZE + 1, ALIGNMENT)
    ]
    counts = {
        corner: int(((centers >= corner) & (centers < np.add(corner, SIZE))).all(axis=1).sum())
        for corner in corners
    }
    found: list[tuple[int, int]] = []
    for x, y in sorted(corners, key=lambda corner: -counts[corner]):
        overlaps = any(abs(x - left) < SIZE and abs(y - top) < SIZE for left, top in found)
        if len(found) < num_crops and not overlaps and MIN_NUCLEI <= counts[x, y] <= MAX_NUCLEI:
            found.append((x, y))
    return found


def cropped(nuclei: list[dict[str, Any]], x: int, y: int) -> list[dict[str, Any]]:
    """Return the visible parts of nuclei in the crop with the corner (x, y), as COCO's fields."""
    masks = mask_utils.decode([nucleus["segmentation"] for nucleus in nuclei])
    parts = []
    for rle in mask_utils.encode(np.asfortranarray(masks[y : y + SIZE, x : x + SIZE])):
        area, box = int(mask_utils.area(rle)), [int(side) for side in mask_utils.toBbox(rle)]
        if area >= MIN_AREA and min(box[2:]) >= MIN_SIDE:
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
            parts.append({"iscrowd": 0, "area": area, "bbox": box, "segmentation": segmentation})
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Make the embedded data set of nuclei.")
    parser.add_argument(
        "--source",
        type=Path,
        default=SOURCE,
        metavar="FOLDER",
        help="nuclei_dsb2018 (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=PACKAGED,
        metavar="FOLDER",
        help="what it has of the set is replaced (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    for split in NUM_CROPS:
        shutil.rmtree(args.output / split, ignore_errors=True)
        make_split(split, args.source, args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
