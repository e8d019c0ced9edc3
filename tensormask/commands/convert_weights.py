"""Write weights for another program: `python tools/convert_weights.py model_final.pth model.pkl`.

A file with our names is written with detectron2's, one of detectron2 with ours.
"""

import argparse
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
import yaml
from torch import Tensor

from tensormask.checkpoint.files import (
    DESCRIPTION,
    check_all_arrays,
    read_checkpoint,
    split_weights,
)
from tensormask.checkpoint.names import OURS, find_kind, to_detectron2_names, to_our_names
from tensormask.checkpoint.pickles import shorten
from tensormask.engine.resume import write_atomically
from tensormask.model_zoo import resolve
from tensormask.utils.errors import UserError

EXIT_MISTAKE = 2
# How detectron2 knows a file that needs no guessing of names.
_DETECTRON2_MARKS = {"__author__": "tensormask", "matching_heuristics": False}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write the weights of a TensorMask with the names of detectron2 or of this "
        "library, and in another format. No number changes. class_names, category_ids and config "
        "of a checkpoint are kept, and what else it has is named and left out.",
        epilog="detectron2 has no upscale heads and no models without boxes: these are refused. "
        "That a head upscales is known from the config in a checkpoint; a file of weights alone is "
        "taken to have none. detectron2's names do not say in which order the window sizes are: "
        "from small to large, others are refused.",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="checkpoint of this library or of detectron2's TensorMask, in any format; a path, or "
        "a name of the model zoo, or an address",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="file to write: .pth (torch.save), .pkl (like detectron2's released ones) or "
        ".safetensors",
    )
    parser.add_argument(
        "--to",
        choices=("detectron2", "tensormask"),
        help="whose names OUTPUT gets (default: detectron2's if INPUT has ours, else ours)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUTPUT; without this, one that exists is an error",
    )
    return parser.parse_args(arguments)


def convert(content: dict[str, Any], to: str | None, path: Path) -> tuple[dict[str, Any], str]:
    """The content of a checkpoint with other names.

    Args:
        content: as of `read_checkpoint`.
        to: "detectron2", "tensormask", or None for the one that it is not.
        path: of its file, for messages.

    Returns:
        The new content, and a line that says what it is.

    Raises:
        ValueError: it is not all of a TensorMask, or not one that detectron2 has.
    """
    arrays, others = split_weights(content, path)
    check_all_arrays(others, path)
    kind = find_kind(arrays)
    to = to or ("detectron2" if kind == OURS else "tensormask")
    sides = re.findall(r"^head\.mask_pred_(\d+)\.weight$", "\n".join(arrays), re.MULTILINE)
    ours, left_out = to_our_names(arrays, kind, sorted(map(int, sides)))
    weights = {ours[name]: array for name, array in arrays.items() if name in ours}
    sizes = _mask_sizes(weights, path)
    theirs, unknown = to_detectron2_names(weights, sizes)
    if unknown or "head.cls_score.weight" not in weights:
        what = f"{shorten(unknown[0])} is no parameter" if unknown else "it has no classifier"
        raise UserError(
            f"{path} is not a TensorMask: {what}. (Backbones need no conversion: MODEL.WEIGHTS "
            "takes them as they are.)"
        )
    if to == "detectron2":
        _check_detectron2_has_it(weights, sizes, content, path)
        weights = {theirs[name]: array for name, array in weights.items()}
    if isinstance(content.get("model"), dict):
        left_out += map(str, content.keys() - {"model", *DESCRIPTION, *_DETECTRON2_MARKS})
    kept = {key: content[key] for key in DESCRIPTION if key in content}
    said = f"{len(weights)} arrays, names of {to}"
    for what, names in (("kept", [*kept]), ("left out", sorted(left_out))):
        said += f"; {what}: {', '.join(names)}" if names else ""
    marks = _DETECTRON2_MARKS if to == "detectron2" else {}
    # Copies, because numbers that are shared would be written once, or not at all.
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    return {"model": weights, **marks, **kept}, said


def _mask_sizes(weights: dict[str, Tensor], path: Path) -> list[int]:
    """Side of the masks of each mask predictor, by its channels."""
    sizes = []
    while (predictor := weights.get(f"mask_head.mask_pred.{len(sizes)}.weight")) is not None:
        channels = math.prod(predictor.shape[:1])
        sizes.append(math.isqrt(channels))
        if sizes[-1] ** 2 != channels:
            raise UserError(f"{path}: a mask of {channels} pixels is no square")
    return sizes


def _check_detectron2_has_it(
    weights: dict[str, Tensor], sizes: list[int], content: dict[str, Any], path: Path
) -> None:
    if sizes != sorted(set(sizes)):
        raise UserError(
            f"{path} has masks of {sizes} pixels, in an order that detectron2's names do not keep"
        )
    if "head.bbox_pred.weight" not in weights:
        raise UserError(f"{path} has no box head, and every TensorMask of detectron2 has one")
    try:
        options = yaml.safe_load(content["config"])["MODEL"]["TENSOR_MASK"]
        upscales = options["UPSCALE_LAMBDA"] > 1
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return  # no config, or one from before there were upscale heads
    if upscales:
        raise UserError(f"{path} has an upscale head, which detectron2 does not have")


def writer_of(path: Path, content: dict[str, Any]) -> Callable[[BinaryIO], object]:
    """What writes a content, as of `convert`, in the format of a path's suffix.

    Raises:
        ValueError: the format does not exist, or has no place for a dtype.
    """
    if path.suffix == ".pth":
        return lambda file: torch.save(content, file)
    if path.suffix == ".safetensors":
        described = {key: json.dumps(content[key]) for key in DESCRIPTION if key in content}
        data = safetensors.torch.save(content["model"], described)
        return lambda file: file.write(data)
    if path.suffix == ".pkl":
        try:
            arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
        except TypeError as error:
            raise UserError(f"a .pkl holds NumPy arrays ({error}): write a .pth") from error
        # In protocol 3 names are plain text. NumPy before 2 knows this function by its old name
        # only, NumPy 2 by both; it is named once, before the first array.
        data = pickle.dumps({**content, "model": arrays}, protocol=3)
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
        return lambda file: file.write(data)
    raise UserError(
        f"{path.name}: the format is that of the suffix, .pth, .pkl or .safetensors, not "
        f"{path.suffix or 'none'}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 2 for a mistake."""
    args = parse_arguments(arguments)
    output = Path(args.output)
    try:
        if output.exists() and not args.overwrite:
            raise UserError(f"{output} exists: give another OUTPUT, or --overwrite to replace it")
        path = resolve(args.input)
        content, said = convert(read_checkpoint(path), args.to, path)
        write_atomically(output, writer_of(output, content))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    print(f"{output}: {said}")
    return 0
