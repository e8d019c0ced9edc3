"""Damage a copy of a COCO data set in ways that cause every kind of issue in `checks/issues.py`.

`python tests/damage.py annotations.json images/ out/` writes `out/annotations.json` and
`out/images/`, and prints the ids by kind.
"""

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

from PIL import Image

POLYGON = [1, 1, 5, 1, 5, 5]


# Each of these functions returns a function that damages an annotation of an image.


def _set(**fields):
    return lambda annotation, image: annotation.update(fields)


def _box(change):
    def damage(annotation, image):
        annotation["bbox"] = change(*annotation["bbox"], image["width"], image["height"])

    return damage


def _rle(size_change=0, counts=None):
    def damage(annotation, image):
        size = [image["height"] + size_change, image["width"]]
        pixels = size[0] * size[1]
        annotation["segmentation"] = {"size": size, "counts": counts(pixels)}

    return damage


ANNOTATION_DAMAGES = {
    "annotation_malformed": [
        *(_set(image_id=987654321), _set(image_id=None)),
        *(_set(category_id=987654), _set(category_id=[1])),
    ],
    "annotation_ambiguous": [_set(category_id=4712), _set(image_id=990001)],
    "annotation_id_type": [
        lambda annotation, image: annotation.update(image_id=str(annotation["image_id"])),
        lambda annotation, image: annotation.update(category_id=f"{annotation['category_id']}.0"),
    ],
    "iscrowd_malformed": [_set(iscrowd="0"), _set(iscrowd=2)],
    "area_malformed": [_set(area="large"), _set(area=-4.0), _set(area=math.nan)],
    "box_malformed": [
        *(_set(bbox=[1, 2, 3]), _set(bbox=None), _set(bbox="1 2 3 4")),
        *(_set(bbox=[math.nan, 1, 5, 5]), _set(bbox=[1, 1, math.inf, 5])),
        _box(lambda x, y, w, h, *_: [x, y, -w, h]),
    ],
    "box_empty": [
        _box(lambda x, y, w, h, *_: [x, y, w, 0]),
        _box(lambda x, y, w, h, width, _: [width + 3, y, w, h]),
        _box(lambda x, y, w, h, *_: [-w - 3, y, w, h]),
    ],
    "box_beyond": [_box(lambda x, y, w, h, *_: [-20, y, x + w + 20, h])],
    "box_mask_disagree": [_box(lambda x, y, w, h, width, height: [0, 0, width, height])],
    "mask_missing": [_set(segmentation=[]), _set(segmentation=None)],
    "mask_malformed": [
        *(_set(segmentation="polygon"), _set(segmentation={"size": [1, 1]})),
        _rle(1, counts=lambda pixels: [0, pixels]),
        _rle(counts=lambda pixels: [0, pixels + 1]),
        _rle(counts=lambda pixels: [pixels + 5, -5]),
        _rle(counts=lambda pixels: [2**62, 2**62, 2**62, 2**62, pixels]),
        _rle(counts=lambda pixels: [1.5, pixels]),
        _rle(counts=lambda pixels: "P" * 50),  # each character announces another one
        _rle(counts=lambda pixels: "0é0"),
        _rle(counts=lambda pixels: "oooooooo0"),
        _rle(counts=lambda pixels: 7),
    ],
    "mask_empty": [
        _rle(counts=lambda pixels: [pixels]),
        # Valid with a correct box, but too small to cover a pixel.
        _set(segmentation=[[1.2, 1.2, 1.4, 1.2, 1.4, 1.4]], bbox=[1.2, 1.2, 0.2, 0.2]),
    ],
    "polygon_malformed": [
        *(_set(segmentation=[1, 1, 5, 1, 5, 5]), _set(segmentation=[["a"] * 6])),
        *(_set(segmentation=[[1, 1, 5, 5]]), _set(segmentation=[[]])),
        _set(segmentation=[[*POLYGON, 7]]),
        *(_set(segmentation=[[*POLYGON, value, -value]]) for value in (math.nan, math.inf, 1e9)),
    ],
}
STILL_TRAINABLE = {
    *("box_beyond", "box_mask_disagree", "iscrowd_malformed", "area_malformed"),
    "annotation_id_type",
}


def damage(json_file, image_root, out):
    """Write a damaged copy to the folder `out`.

    Returns:
        `{kind: [ids]}` of the damaged entries; entries without an id are named by their location,
        as in "images[12]".
    """
    out = Path(out)
    shutil.copytree(image_root, out / "images")
    content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    done = {}
    _damage_annotations(content, done)
    _damage_entries(content, done)
    _damage_images(content, out, done)
    (out / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return done


def _damage_annotations(content, done):
    images = {image["id"]: image for image in content["images"]}
    # Small objects, whose box can be moved and enlarged noticeably.
    small = [
        annotation
        for annotation in content["annotations"]
        if not annotation.get("iscrowd")
        and annotation["bbox"][2] < images[annotation["image_id"]]["width"] / 2
        and annotation["bbox"][3] >= 4
    ]
    rest = iter(small)
    for kind, ways in ANNOTATION_DAMAGES.items():
        for way in ways:
            annotation = next(rest)
            way(annotation, images[annotation["image_id"]])
            done.setdefault(kind, []).append(annotation["id"])
    one, other = next(rest), next(rest)
    later = max(one, other, key=content["annotations"].index)
    other["id"] = one["id"]
    done["annotation_duplicate_id"] = [later["id"]]
    for value in (None, 7, ["bbox"]):
        content["annotations"].append(value)
        number = len(content["annotations"]) - 1
        done["annotation_malformed"].append(f"annotations[{number}]")


def _damage_entries(content, done):
    images, categories = content["images"], content["categories"]
    images.append(dict(images[0]))
    done["image_duplicate_id"] = [images[0]["id"]]
    images += [dict(images[0], id=990001, file_name=name) for name in ("a/1.png", "b/1.png")]
    done["image_ambiguous_id"] = [990001]
    for fields in ({"id": None}, {"file_name": 7}, {"width": 0}, {"height": "12"}):
        images.append({**images[0], "id": 900000 + len(images), **fields})
        name = images[-1]["id"] or f"images[{len(images) - 1}]"
        done.setdefault("image_malformed", []).append(name)
    images.append("an image")
    done["image_malformed"].append(f"images[{len(images) - 1}]")
    categories.append(copy.deepcopy(categories[0]))
    done["category_duplicate_id"] = [categories[0]["id"]]
    categories += [{"id": 4712, "name": name} for name in ("one", "another")]
    done["category_ambiguous_id"] = [4712]
    categories.append({"id": 4711})
    done["category_malformed"] = [4711]


def _damage_images(content, out, done):
    """Damage the files of images whose annotations are undamaged."""
    bad = {
        identity
        for kind in ("image_duplicate_id", "image_ambiguous_id", "image_malformed")
        for identity in done[kind]
    }
    damaged = {i for ids in done.values() for i in ids}
    touched = {
        a["image_id"] for a in content["annotations"] if isinstance(a, dict) and a["id"] in damaged
    }
    entries = [i for i in content["images"] if isinstance(i, dict) and i.get("id") not in bad]
    rest = iter([i for i in entries if i["id"] not in touched])
    # Images outside of the image root, which must not be opened.
    for file_name in ("../secret.png", str((out / "secret.png").absolute()), "a/../../secret.png"):
        image = next(rest)
        Image.new("RGB", (image["width"], image["height"]), (255, 0, 0)).save(out / "secret.png")
        image["file_name"] = file_name
        done.setdefault("image_missing", []).append(image["id"])
    image = next(rest)
    (out / "images" / image["file_name"]).unlink()
    done["image_missing"].append(image["id"])
    for change in (lambda data: b"", lambda data: b"no image", lambda data: data[: len(data) // 2]):
        image = next(rest)
        path = out / "images" / image["file_name"]
        path.write_bytes(change(path.read_bytes()))
        done.setdefault("image_broken", []).append(image["id"])
    image = next(rest)
    path = out / "images" / image["file_name"]
    Image.open(path).resize((image["width"] + 1, image["height"])).save(path)
    done["image_size"] = [image["id"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for argument in ("json_file", "image_root", "out"):
        parser.add_argument(argument, type=Path)
    for kind, ids in damage(**vars(parser.parse_args())).items():
        print(f"{len(ids):4d}  {kind}: {ids}")
