"""Writes small data sets in the formats that `tensormask convert-data` reads, and reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.formats.regions import mask_utils
from tensormask.data.formats.source import Source

SIZE = (8, 12)  # height, width
SQUARE = [[2.0, 2.0], [6.0, 2.0], [6.0, 6.0], [2.0, 6.0]]  # 4 x 4 px
NAMES = ["細胞核", "клетка"]


def write_image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(path)
    return path


def write_yolo(folder: Path, lines: dict[str, str], **content) -> Path:
    """Write images of `lines`, such as {"train/a": "0 0.5 ..."}, and a `data.yaml`."""
    for name, text in lines.items():
        write_image(folder / "images" / f"{name}.png")
        label_file = folder / "labels" / f"{name}.txt"
        label_file.parent.mkdir(parents=True, exist_ok=True)
        label_file.write_text(text, encoding="utf-8")
    splits = {name.partition("/")[0] for name in lines}
    content = {"names": NAMES, **{s: f"images/{s}" for s in sorted(splits)}, **content}
    yaml_file = folder / "data.yaml"
    yaml_file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return yaml_file


def yolo_line(points, number=0, size=SIZE) -> str:
    normalized = [f"{x / size[1]:.6f} {y / size[0]:.6f}" for x, y in points]
    return f"{number} {' '.join(normalized)}\n"


def write_labelme(folder: Path, shapes, name: str = "a", **content) -> Path:
    write_image(folder / f"{name}.png")
    content = {"imagePath": f"{name}.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]} | content
    json_file = folder / f"{name}.json"
    json_file.write_text(json.dumps({"version": "5.5.0", "shapes": shapes} | content))
    return json_file


def shape(kind="polygon", points=SQUARE, label=NAMES[0], **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def write_cvat(folder: Path, shapes: str, head: str = "", **attributes) -> Path:
    write_image(folder / "images" / "a.png")
    attributes = {"id": 0, "name": "a.png", "width": SIZE[1], "height": SIZE[0]} | attributes
    listed = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    xml_file = folder / "annotations.xml"
    xml_file.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n{head}<annotations><version>1.1</version>'
        f"<meta><job><labels>{labels}</labels></job></meta>"
        f"<image {listed}>"
        f"{shapes}</image></annotations>",
        encoding="utf-8",
    )
    return xml_file


def write_voc(folder: Path, objects, classes, palette=None, label_map="") -> Path:
    write_image(folder / "JPEGImages" / "a.jpg", np.shape(objects)[:2])
    for name, values in (("Object", objects), ("Class", classes)):
        path = folder / f"Segmentation{name}" / "a.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(np.asarray(values, np.uint8))
        if palette:
            image.putpalette(palette)
        image.save(path)
    if label_map:
        (folder / "labelmap.txt").write_text(label_map, encoding="utf-8")
    return folder


def read(reader, path, *, class_names=(), traced=False):
    path = Path(path)
    source = Source(path if path.is_dir() else path.parent, class_names, traced=traced)
    reader(path, source)
    source.finish()
    return source


def masks(source):
    """The mask of each object, bool (H, W), by image."""
    return [
        [
            mask_utils.decode(segmentation_to_rle(o.segmentation, image.size)).astype(bool)
            for o in image.objects
        ]
        for image in source.images
    ]


def names(source):
    return [found.name for image in source.images for found in image.objects]


def square(x0=2, y0=2, x1=6, y1=6):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask
