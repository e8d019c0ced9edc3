"""Write the graph of a model to a file, with what is needed to use it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

import tensormask
from tensormask.export.graph import DetectionGraph
from tensormask.layers import op_backend
from tensormask.predictor import Predictor
from tensormask.utils.extras import require
from tensormask.utils.files import write_atomically

FORMATS = ("onnx", "torch")
# In the archive of `torch.export.save`; of an ONNX file, each entry is one of its metadata.
DESCRIPTION_FILE = "tensormask.json"


def trace(graph: DetectionGraph, *, batch: int, dynamic_batch: bool) -> ExportedProgram:
    """Return the graph as a program of `torch.export`, for ``batch`` images or any number."""
    if dynamic_batch:
        batch = max(batch, 2)  # one image is a special case for the exporter
    images = torch.zeros(batch, 3, *graph.size, dtype=torch.uint8)
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    # Compiled operators are no part of a file.
    with torch.no_grad(), op_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's nms
        return torch.export.export(graph, (images,), dynamic_shapes=shapes)


def write_torch(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write a `.pt2`, for `torch.export.load`."""
    extra = {DESCRIPTION_FILE: json.dumps(description)}
    write_atomically(path, lambda file: torch.export.save(program, file, extra_files=extra))


def write_onnx(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write an ONNX file with its weights inside.

    Raises:
        UserError: a package is missing.
    """
    for package in ("onnx", "onnxscript"):
        require(package, extra="export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        converted = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=[*_names(program)],
            dynamo=True,
            verbose=False,
        )
    assert converted is not None
    for name, value in description.items():
        converted.model.metadata_props[name] = json.dumps(value)
    content = converted.model_proto.SerializeToString()
    write_atomically(path, lambda file: file.write(content))


def _names(program: ExportedProgram) -> list[str]:
    """Return the names of the outputs, which are a dict."""
    return list(program.call_spec.out_spec.context)


def describe(predictor: Predictor, graph: DetectionGraph) -> dict[str, Any]:
    """Return what a user of the file has to know, as numbers, texts and lists of them."""
    model, transform = predictor.model, predictor.transform
    mean = model.pixel_mean.flatten().tolist()
    mean = mean[::-1] if model.channel_order == "BGR" else mean
    return {
        "class_names": predictor.class_names,
        "category_ids": predictor.category_ids,
        "score_threshold": predictor.score_threshold,
        "lowest_score": model.score_threshold,
        "input_size": list(graph.size),
        "pixel_order": "RGB",
        "min_size": transform.min_sizes[0],
        "max_size": transform.max_size,
        "padding_color": [min(max(round(value), 0), 255) for value in mean],
        "tensormask_version": tensormask.__version__,
    }
