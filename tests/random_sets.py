"""Random data sets of ellipses, causes that make all of them wrong, and what is diagnosed."""

import json

import numpy as np
from pycocotools import mask as mask_utils

from tensormask.data import CocoDataset


def random_set(rng, num_annotations, with_rle=True):
    """Ellipses in images of several sizes, as polygons and run-length codes, a few crowds."""
    images = []
    for identity in range(1, max(2, num_annotations // 4) + 1):
        height, width = rng.integers(60, 700, 2).tolist()
        width += (width == height) * 7
        images.append({"id": identity, "file_name": f"{identity}.png"})
        images[-1] |= {"height": height, "width": width}
    annotations = []
    for identity in range(1, num_annotations + 1):
        image = images[identity % len(images)]
        size = np.array([image["width"], image["height"]])
        radius = rng.uniform(0.02, 0.3, 2) * size.min()
        center = radius + rng.uniform(0, 1, 2) * (size - 2 * radius)
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        points = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        polygon = points.round(2).ravel().tolist()
        segmentation = [polygon]
        if with_rle and identity % 3 == 0:
            code = mask_utils.frPyObjects([polygon], *size[::-1].tolist())[0]
            segmentation = {"size": code["size"], "counts": code["counts"].decode()}
        low, high = points.min(axis=0), points.max(axis=0)
        area = 6 * np.sin(np.pi / 6) * radius.prod()
        annotations.append(
            {
                **{"id": identity, "image_id": image["id"]},
                "category_id": 1 + (identity % 3 if num_annotations > 3 else 0),
                "bbox": [*low.round(2).tolist(), *(high - low).round(2).tolist()],
                **{"segmentation": segmentation, "area": float(area), "iscrowd": 0},
            }
        )
    categories = [{"id": i, "name": name} for i, name in enumerate("abc", start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def diagnosed(content, folder):
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return CocoDataset("set", path, folder)


def names_of(dataset):
    return [diagnosis.name for diagnosis in dataset.diagnoses]


def polygon_of(annotation):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        return segmentation[0]
    x, y, width, height = annotation["bbox"]
    return [x, y, x + width, y, x + width, y + height, x, y + height]


# Each of these changes one annotation of an image.


def scaled(factor):
    def change(annotation, image):
        size = image["width"], image["height"]
        polygon = np.array(polygon_of(annotation)).reshape(-1, 2) / size * factor
        annotation["segmentation"] = [polygon.ravel().tolist()]
        annotation["bbox"] = (np.array(annotation["bbox"]) / (size * 2) * factor).tolist()
        annotation["area"] *= (factor / image["width"]) * (factor / image["height"])

    return change


def boxes(change):
    def apply(annotation, image):
        x, y, width, height = annotation["bbox"]
        size = (image["width"], image["height"])
        annotation["bbox"] = [float(value) for value in change(x, y, width, height, *size)]

    return apply


def polygons(change):
    def apply(annotation, image):
        annotation["segmentation"] = change(polygon_of(annotation))

    return apply


def fields(**changes):
    def apply(annotation, image):
        for key, value in changes.items():
            annotation[key] = value(annotation[key]) if callable(value) else value

    return apply


def swapped_axes(annotation, image):
    x, y, width, height = annotation["bbox"]
    points = np.array(polygon_of(annotation)).reshape(-1, 2)
    annotation["segmentation"] = [points[:, ::-1].ravel().tolist()]
    annotation["bbox"] = [y, x, height, width]


def rle_of(transposed):
    def apply(annotation, image):
        size = [image["width"], image["height"]]
        size = size if transposed else [2 * side for side in size[::-1]]
        mask = np.zeros(size, np.uint8, order="F")
        mask[: size[0] // 2] = 1
        code = mask_utils.encode(mask)
        annotation["segmentation"] = {"size": size, "counts": code["counts"].decode()}

    return apply


def size_of(image):
    return np.array([image["width"], image["height"]])


def points_of(polygon):
    return np.reshape(polygon, (-1, 2)).tolist()


CAUSES = {
    "shares": (scaled(1), "coordinates_normalized"),
    "shares, boxes only": (
        boxes(lambda x, y, w, h, width, height: (x / width, y / height, w / width, h / height)),
        "coordinates_normalized",
    ),
    "shares, YOLO": (
        boxes(
            lambda x, y, w, h, width, height: (
                *((x + w / 2) / width, (y + h / 2) / height),
                *(w / width, h / height),
            )
        ),
        "coordinates_normalized",
    ),
    "shares, masks only": (
        polygons(lambda polygon: [(np.array(polygon) / 700).tolist()]),
        "coordinates_normalized",
    ),
    "percent, boxes only": (
        boxes(lambda x, y, w, h, *size: np.array([x, y, w, h]) / (size * 2) * 100),
        "coordinates_normalized",
    ),
    "corners": (boxes(lambda x, y, w, h, *_: (x, y, x + w, y + h)), "boxes_as_corners"),
    "centers": (boxes(lambda x, y, w, h, *_: (x + w / 2, y + h / 2, w, h)), "boxes_as_centers"),
    "boxes y, x": (boxes(lambda x, y, w, h, *_: (y, x, h, w)), "axes_swapped"),
    "corners y, x": (boxes(lambda x, y, w, h, *_: (y, x, y + h, x + w)), "axes_swapped"),
    "masks y, x": (
        polygons(lambda polygon: [np.reshape(polygon, (-1, 2))[:, ::-1].ravel().tolist()]),
        "axes_swapped",
    ),
    "boxes doubled": (
        boxes(lambda x, y, w, h, *_: (2 * x, 2 * y, 2 * w, 2 * h)),
        "boxes_disagree",
    ),
    "three times the size": (
        lambda annotation, image: (
            boxes(lambda x, y, w, h, *_: (3 * x + 40, 3 * y + 40, 3 * w, 3 * h))(annotation, image),
            polygons(lambda p: [(np.array(p) * 3 + 40).tolist()])(annotation, image),
        ),
        "coordinates_beyond",
    ),
    "from the image's center": (
        lambda annotation, image: (
            boxes(lambda x, y, w, h, *size: (x - size[0] / 2, y - size[1] / 2, w, h))(
                annotation, image
            ),
            polygons(
                lambda p: [(np.array(p).reshape(-1, 2) - size_of(image) / 2).ravel().tolist()]
            )(annotation, image),
        ),
        "coordinates_beyond",
    ),
    "crowds": (fields(iscrowd=1), "crowds"),
    "area 1": (fields(area=1.0), "areas_wrong"),
    "area 0": (fields(area=0), "areas_wrong"),
    "area in per cent": (fields(area=lambda area: area * 100), "areas_wrong"),
    "area of a third": (fields(area=lambda area: area / 3), "areas_wrong"),
    "boxes as text": (fields(bbox=lambda box: [str(value) for value in box]), "boxes_malformed"),
    "boxes as objects": (fields(bbox=lambda box: {"xywh": box}), "boxes_malformed"),
    "no boxes": (fields(bbox=None), "boxes_malformed"),
    "masks without a pixel": (polygons(lambda p: [p[:2] * 3]), "masks_malformed"),
    "image ids as text": (fields(image_id=str), "ids_of_another_type"),
    "category ids as text": (fields(category_id=str), "ids_of_another_type"),
    "image ids unknown": (fields(image_id=lambda i: i + 10_000), "ids_unknown"),
    "image ids are files": (fields(image_id=lambda i: f"{i}.png"), "ids_unknown"),
    "image ids are names": (fields(image_id=lambda i: f"img{i}"), "ids_unknown"),
    "category ids are names": (fields(category_id=lambda i: "_abc"[i]), "ids_unknown"),
    "category ids unknown": (fields(category_id=lambda i: i + 90), "ids_unknown"),
    "no masks": (fields(segmentation=None), "masks_missing"),
    "empty masks": (fields(segmentation=[]), "masks_missing"),
    "flat": (polygons(lambda polygon: polygon), "masks_malformed"),
    "points": (polygons(points_of), "masks_malformed"),
    "nested points": (polygons(lambda polygon: [points_of(polygon)]), "masks_malformed"),
    "objects": (polygons(lambda p: [{"x": p[::2], "y": p[1::2]}]), "masks_malformed"),
    "text": (polygons(lambda polygon: json.dumps([polygon])), "masks_malformed"),
    "transposed RLE": (rle_of(transposed=True), "masks_malformed"),
    "RLE of another size": (rle_of(transposed=False), "masks_malformed"),
}
