"""Processor time and memory of an evaluation with pycocotools, and with faster-coco-eval.

The set is synthetic, with the statistics of COCO val2017: images of 480 x 640 pixels with 7.3
objects on average, of 80 classes whose frequencies fall as 1/rank, with sides from 10 to 350 pixels
(uniform in the logarithm) and outlines of 24 points. Each object has 4 detections, moved and
rescaled by 10 % of its size, 85 % of them of its class; the others are objects of other places.
Shapes come from a pool, so that the set is made in seconds.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from tensormask.engine.events import peak_memory
from tensormask.evaluation.evaluators import EVALUATORS
from tensormask.evaluation.scoring import score
from tensormask.utils.tables import format_records

_SIZE = (480, 640)  # height and width
_NUM_CLASSES = 80
_OBJECTS = 7.3  # of an image, on average
_NUM_VARIANTS = 4  # detections of an object
_NUM_SHAPES = 3000  # in the pool

Entry = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument(
        "--detections", type=int, default=100, metavar="N", help="of each image (default: 100)"
    )
    parser.add_argument("--evaluators", nargs="+", choices=EVALUATORS, default=[*EVALUATORS])
    parser.add_argument(
        "--iou-types",
        nargs="+",
        choices=("bbox", "segm", "boundary"),
        default=["bbox", "segm"],
        help="boundary: by faster_coco_eval only (default: bbox segm)",
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows. Loading the results is part of the time."""
    coco, results = make_set(args.images, args.detections)
    classes, image_ids = sorted(coco.cats), sorted(coco.imgs)
    names, rows = [str(category) for category in classes], []
    for iou_type in args.iou_types:
        for evaluator in args.evaluators:
            if iou_type == "boundary" and evaluator == "pycocotools":
                continue
            start, wall = time.process_time(), time.perf_counter()
            scores = score(*(coco, results, iou_type, names, classes, image_ids, 100, evaluator))
            rows.append(
                {
                    "IoU": iou_type,
                    "evaluator": evaluator,
                    "processor s": time.process_time() - start,
                    "wall s": time.perf_counter() - wall,
                    "peak MiB": peak_memory(torch.device("cpu")),
                    "AP": scores.metrics["AP"],
                }
            )
    print(format_records(rows))
    return rows


def make_set(num_images: int, num_detections: int) -> tuple[COCO, list[Entry]]:
    """Return the ground truth and the results of the set that this module describes."""
    rng = np.random.default_rng(0)
    pool = [_draw(rng) for _ in range(_NUM_SHAPES)]
    frequencies = 1 / np.arange(1, _NUM_CLASSES + 1)
    frequencies /= frequencies.sum()
    images, annotations, results = [], list[Entry](), list[Entry]()
    for image_id in range(num_images):
        images.append({"id": image_id, "height": _SIZE[0], "width": _SIZE[1]})
        num_objects = min(rng.poisson(_OBJECTS), num_detections // _NUM_VARIANTS)
        chosen = rng.integers(0, _NUM_SHAPES, num_objects)
        classes = rng.choice(_NUM_CLASSES, num_objects, p=frequencies)
        found: list[tuple[Entry, int, float]] = []
        for shape, category in zip(chosen, classes.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            area = float(mask_utils.area(pool[shape][0]["segmentation"]))
            annotations.append({**entry, **pool[shape][0], "area": area, "iscrowd": 0})
            for variant in pool[shape][1:]:
                is_right = rng.random() < 0.85
                label = category if is_right else int(rng.integers(0, _NUM_CLASSES))
                found.append((variant, label, rng.beta(3, 2)))
        num_others = num_detections - len(found)
        others = rng.choice(_NUM_CLASSES, num_others, p=frequencies)
        shapes = rng.integers(0, _NUM_SHAPES, num_others)
        scores = rng.beta(1, 8, num_others)
        found += [(pool[i][0], int(c), s) for i, c, s in zip(shapes, others, scores, strict=True)]
        found.sort(key=lambda one: -one[2])
        results += [
            {"image_id": image_id, "category_id": label, "score": float(score), **region}
            for region, label, score in found
        ]
    coco = COCO()
    coco.dataset = {
        "images": images,
        "categories": [{"id": i, "name": str(i)} for i in range(_NUM_CLASSES)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco, results


def _draw(rng: np.random.Generator) -> list[Entry]:
    """Return the box and the mask of an object, and those of its detections."""
    height, width = _SIZE
    radius = np.exp(rng.uniform(np.log(5), np.log(175))) * np.exp(rng.normal(0, 0.3, 2))
    radius = np.minimum(radius, (width / 2, height / 2))
    center = rng.uniform(radius, (width, height) - radius)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.6, 1, (24, 1))
    shapes = []
    for number in range(1 + _NUM_VARIANTS):
        noise = 0.1 * (number > 0)
        scale = radius * np.exp(rng.normal(0, noise, 2))
        points = outline * scale + center + rng.normal(0, noise, 2) * radius
        points = points.clip(0, (width, height))
        (code,) = mask_utils.frPyObjects([points.ravel().tolist()], height, width)
        segmentation = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        shapes.append({"bbox": mask_utils.toBbox(code).tolist(), "segmentation": segmentation})
    return shapes
