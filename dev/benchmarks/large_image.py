"""Our memory for a very large image, and for very many detections."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import options
from .memory import Calls, peak_memory
from .models import build_tensormask, make_image, spread_detections
from .timing import format_table

# Height and width in pixels of the image and of what is left of it at test size 800, and
# detections.
_LARGE = ((4000, 6000), (800, 1200), 100)
_MANY = ((800, 1344), (794, 1333), 400)
# How an image is taken: `Predictor` gives frames of bool, `results` COCO's run lengths, as an
# evaluation does.
_CASES = (
    ("large image", "predictor", *_LARGE),
    ("large image", "results", *_LARGE),
    ("many detections", "predictor", *_MANY),
    ("many detections", "results", *_MANY),
)


def measure_large_images(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table of peaks above the loaded model, and return its rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file, weights = Path(folder) / "image.png", Path(folder) / "weights.pth"
        for case, way, size, input_size, detections in _CASES:
            if way == "predictor":  # the first of its case
                rgb = make_image(size).permute(1, 2, 0).numpy()
                Image.fromarray(rgb).save(file, compress_level=1)
                model = build_tensormask(options.read_config(args, detections))
                spread_detections(model, make_image(input_size))
                torch.save({"model": model.state_dict()}, weights)
            peak = peak_memory(
                f"{__name__}:memory_calls",
                args.device,
                arguments=options.as_json(args),
                file=str(file),
                weights=str(weights),
                way=way,
                detections=detections,
            )
            rows.append(
                {
                    "case": case,
                    "way": way,
                    "image": f"{size[1]} x {size[0]}",
                    "detections": detections,
                    **options.in_mib(peak),
                }
            )
    print("peak memory of a fresh process, above the model after an image of 64 x 64 px")
    print(format_table(rows))
    return {"memory": rows}


def memory_calls(
    arguments: dict[str, Any], file: str, weights: str, way: str, detections: int
) -> Calls:
    """What `memory.peak_memory` measures: a file on the disk to its detections."""
    # These need more of the environment than the rest of the benchmarks.
    from tensormask.data.images import read_image
    from tensormask.data.transforms import image_to_tensor, transform_image
    from tensormask.evaluation.results import coco_results
    from tensormask.predictor import Predictor

    args = argparse.Namespace(**arguments)
    options.configure(args)
    predictor = Predictor(options.read_config(args, detections), weights)

    @torch.inference_mode()
    def small() -> None:
        predictor.model([make_image((64, 64))])

    def frames() -> None:
        _check(predictor(file)["scores"], detections)

    @torch.inference_mode()
    def results() -> None:
        rgb = read_image(file)
        size = rgb.shape[:2]
        geometry = predictor.transform.draw(size, np.random.default_rng(0))
        image = image_to_tensor(transform_image(rgb, geometry))
        (found,) = predictor.model.detect([image], [size])
        coco_results(found, 0, predictor.category_ids, size)
        _check(found["scores"], detections)

    return small, frames if way == "predictor" else results


def _check(scores: Tensor, detections: int) -> None:
    if len(scores) != detections:
        raise ValueError(f"{len(scores)} detections where {detections} are meant")
