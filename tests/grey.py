"""Data sets of grey images with rectangles, and a model with prescribed detections."""

import json

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import nn

from tensormask.data import CocoDataset
from tensormask.evaluation import evaluate

CATEGORY_IDS = [4, 17, 90]
CLASS_NAMES = ["disc", "bar", "never"]  # no object is of the class "never"


class FakeModel(nn.Module):
    """Return the detections of the image id that is stored in the first pixel of an image."""

    def __init__(self, detections):
        super().__init__()
        self.detections = detections
        self.frozen = nn.BatchNorm2d(1).eval()
        self.tower = nn.Dropout()

    def forward(self, images, output_sizes):
        assert not self.training
        assert not self.tower.training
        assert torch.is_inference_mode_enabled()
        detections = [self.detections[int(image[0, 0, 0])] for image in images]
        for detection, size in zip(detections, output_sizes, strict=True):
            assert tuple(detection["masks"].shape[1:]) == size
        return detections


def evaluate_found(found, dataset, output_dir=None, **options):
    """Evaluate a model that returns the detections `found[image_id]`."""
    return evaluate(FakeModel(found), dataset.loader(), dataset, output_dir, **options)


class GreyDataset(CocoDataset):
    """A data set of a dict in COCO's annotation format, with grey images instead of files."""

    def __init__(self, annotations, tmp_path, name="grey"):
        self.json_file = tmp_path / "annotations.json"
        self.json_file.write_text(json.dumps(annotations))
        super().__init__(name, self.json_file, tmp_path)

    def load_image(self, image):
        return np.full((image["height"], image["width"], 3), 90, np.uint8)

    def loader(self):
        for image_id in self.image_ids:
            height, width = self.image_size(image_id)
            image = torch.full((3, 8, 8), image_id, dtype=torch.uint8)
            yield [{"image": image, "image_id": image_id, "height": height, "width": width}]


def rectangle(x0, y0, x1, y1, height=128, width=160):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def annotation(number, image_id, category_id, mask, iscrowd=0):
    code = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    ids = {"id": number, "image_id": image_id, "category_id": category_id}
    sizes = {"bbox": rle_tools.toBbox(code).tolist(), "area": float(mask.sum())}
    segmentation = {"size": code["size"], "counts": code["counts"].decode()}
    return {**ids, **sizes, "iscrowd": iscrowd, "segmentation": segmentation}


def coco_json(annotations, num_images=1, height=128, width=160):
    size = {"height": height, "width": width}
    images = [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, num_images + 1)]
    names = zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
    categories = [{"id": i, "name": name} for i, name in names]
    return {"images": images, "categories": categories, "annotations": annotations}


def detections(masks, labels, scores, size=(128, 160)):
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, *size)),
    }


def noisy_case(tmp_path, num_images=16):
    """Objects of all sizes and crowds; detections are shifted, missing, duplicate, mislabelled."""
    rng = np.random.default_rng(0)
    annotations, per_image = [], {}
    for image_id in range(1, num_images + 1):
        masks, labels, scores = [], [], []
        for _ in range(rng.integers(0, 7)):
            w, h = np.exp(rng.uniform(np.log(6), np.log(126), 2)).astype(int)
            x, y = rng.integers(0, 160 - w), rng.integers(0, 128 - h)
            label = int(rng.integers(0, 2))
            mask = rectangle(x, y, x + w, y + h)
            crowd = int(rng.random() < 0.1)
            number = len(annotations) + 1
            annotations.append(annotation(number, image_id, CATEGORY_IDS[label], mask, crowd))
            for _ in range(rng.integers(0, 3)):
                masks.append(np.roll(mask, tuple(rng.integers(-3, 4, 2)), (0, 1)))
                labels.append(label if rng.random() < 0.8 else 1 - label)
                scores.append(rng.random())
        order = np.argsort(-np.array(scores, float))
        columns = ([column[i] for i in order] for column in (masks, labels, scores))
        per_image[image_id] = detections(*columns)
    return GreyDataset(coco_json(annotations, num_images), tmp_path), per_image
