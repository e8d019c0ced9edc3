"""Random data sets of ellipses, and what is diagnosed of them."""

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
