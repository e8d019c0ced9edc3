"""Convert weights for another program: `tensormask convert-weights model_final.pth model.pkl`.

A file with our names gets detectron2's, and the other way around. `--to tensormask --dtype float16`
writes a file of half the size for this library.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import (
    DESCRIPTION,
    check_all_arrays,
    read_checkpoint,
    safetensors_bytes,
    split_weights,
)
from tensormask.checkpoint.names import OURS, find_kind, to_detectron2_names, to_our_names
from tensormask.commands.common import CommandParser, exits_on_user_error
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import write_atomically

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The largest error of an array, relative to its norm: twice that of numbers within the range.
_MAX_ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# With these, detectron2 takes the names as they are and does not match them by heuristics.
_DETECTRON2_MARKS = {"__author__": "tensormask", "matching_heuristics": False}


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "convert-weights",
        description="Write the weights of a TensorMask with the names of detectron2 or of this "
        "library, and in another format. No number changes without --dtype. class_names, "
        "category_ids, config and score_threshold of a checkpoint are kept; its other entries are "
        "listed and left out.",
        epilog="What detectron2 does not have is refused with its names: upscale heads, finer "
        "masks (MASK_UNIT), norms in the towers, models without a box head, other trunks. The "
        "first three are recognized by the config in the checkpoint; weights without a config are "
        "taken for a model without them. detectron2's names do not keep the order of the window "
        "sizes: a model whose sizes are not ascending is refused.",
        example="output/quickstart/model_final.pth model.pkl",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="checkpoint of this library or of detectron2's TensorMask, in any format: a path, a "
        "name of the model zoo, or a URL",
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
        help="the names in OUTPUT (default: detectron2's if INPUT has ours, else ours)",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="round the weights of convolutions and linear layers to it. Biases, norms, and "
        "arrays that it cannot represent keep their dtype (default: all do)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the averaged weights (SOLVER.EMA) of a checkpoint that has both",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing OUTPUT, which is an error otherwise",
    )
    return parser


def convert(content: dict[str, Any], to: str | None, path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a checkpoint with other names, and a line that describes it.

    Args:
        content: as returned by `read_checkpoint`.
        to: "detectron2" or "tensormask"; None for the other one than the content has.
        path: of its file, for messages.

    Raises:
        ValueError: it is not a complete TensorMask, or one that detectron2 does not support.
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
    has_classifier = "head.cls_score.weight" in weights
    if has_classifier and kind == OURS:
        if unknown and to == "detectron2":
            raise UserError(
                f"{path}: {shorten(unknown[0])} is no parameter of detectron2's TensorMask; "
                "--to tensormask keeps the names of this library"
            )
    elif unknown or not has_classifier:
        what = f"{shorten(unknown[0])} is no parameter" if unknown else "it has no classifier"
        raise UserError(
            f"{path} is not a TensorMask: {what}. (Backbones need no conversion: MODEL.WEIGHTS "
            "takes them as they are.)"
        )
    if to == "detectron2":
        _check_supported(weights, sizes, content, path)
        weights = {theirs[name]: array for name, array in weights.items()}
    if isinstance(content.get("model"), dict):
        left_out += map(str, content.keys() - {"model", *DESCRIPTION, *_DETECTRON2_MARKS})
    kept = {key: content[key] for key in DESCRIPTION if key in content}
    summary = f"{len(weights)} arrays, names of {to}"
    for what, names in (("kept", [*kept]), ("left out", sorted(left_out))):
        summary += f"; {what}: {', '.join(names)}" if names else ""
    marks = _DETECTRON2_MARKS if to == "detectron2" else {}
    # Copies: a file of safetensors cannot share numbers, and a mapped INPUT may be replaced.
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    return {"model": weights, **marks, **kept}, summary


def _mask_sizes(weights: dict[str, Tensor], path: Path) -> list[int]:
    """Return the side of the masks of each mask predictor, from its channels."""
    sizes: list[int] = []
    while (predictor := weights.get(f"mask_head.mask_pred.{len(sizes)}.weight")) is not None:
        channels = math.prod(predictor.shape[:1])
        sizes.append(math.isqrt(channels))
        if sizes[-1] ** 2 != channels:
            raise UserError(f"{path}: a mask of {channels} pixels is not square")
    return sizes


def _check_supported(
    weights: dict[str, Tensor], sizes: list[int], content: dict[str, Any], path: Path
) -> None:
    if sizes != sorted(set(sizes)):
        raise UserError(
            f"{path} has masks of {sizes} pixels, an order that detectron2's names do not keep"
        )
    if "head.bbox_pred.weight" not in weights:
        raise UserError(f"{path} has no box head, and every TensorMask of detectron2 has one")
    try:
        options = yaml.safe_load(content["config"])["MODEL"]["TENSOR_MASK"]
        found = {
            "an upscale head": options["UPSCALE_LAMBDA"] > 1,
            "finer masks (MASK_UNIT)": options.get("MASK_UNIT", 0) > 0,
            "norms in its towers (NORM)": bool(options.get("NORM")),
            "predicted IoUs of masks (MASK_IOU_ON)": bool(options.get("MASK_IOU_ON")),
        }
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return  # no config, or one that is older than the upscale heads
    for what, is_found in found.items():
        if is_found:
            raise UserError(f"{path} has {what}, which detectron2 does not have")


def take_averages(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint with its averaged weights as its weights.

    Its score threshold is left out, which is of the other weights.

    Raises:
        UserError: it has no averages.
    """
    averages = content.get("ema")
    if not isinstance(averages, dict) or not isinstance(averages.get("model"), dict):
        raise UserError(f"{path} has no averaged weights beside its weights: leave out --ema")
    beside = ("ema", "score_threshold")
    return {key: value for key, value in content.items() if key not in beside} | {
        "model": averages["model"]
    }


def round_weights(weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return weights in a smaller dtype, and the number of arrays that it cannot represent.

    Arrays of one dimension are not rounded: they are small, and variances of batch norms have a
    large range. An array is not rounded either if its numbers leave the range of the dtype.
    """
    rounded, num_kept = {}, 0
    for name, array in weights.items():
        rounded[name] = array
        if array.dim() > 1 and array.is_floating_point():
            other = array.to(dtype)
            error = torch.linalg.vector_norm(other.double() - array.double())
            limit = _MAX_ROUNDING[dtype] * torch.linalg.vector_norm(array.double())
            if error <= limit:  # not if one is NaN or infinite
                rounded[name] = other
            else:
                num_kept += 1
    return rounded, num_kept


def writer_of(path: Path, content: dict[str, Any]) -> Callable[[BinaryIO], object]:
    """Return a function that writes a content of `convert` in the format of a path's suffix.

    Raises:
        ValueError: the format is unknown, or does not support a dtype.
    """
    if path.suffix == ".pth":
        return lambda file: torch.save(content, file)
    if path.suffix == ".safetensors":
        data = safetensors_bytes(content["model"], content)
        return lambda file: file.write(data)
    if path.suffix == ".pkl":
        try:
            arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
        except TypeError as error:
            raise UserError(f"a .pkl has NumPy arrays ({error}): write a .pth") from error
        # Protocol 3 writes names as plain text. NumPy 2 has this function by both names, NumPy 1
        # by the old one only. The name occurs once, before the first array.
        data = pickle.dumps({**content, "model": arrays}, protocol=3)
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
        return lambda file: file.write(data)
    raise UserError(
        f"{path.name}: the suffix sets the format: give .pth, .pkl or .safetensors, not "
        f"{path.suffix or 'none'}"
    )


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for a mistake of the user."""
    args = build_parser().parse_args(arguments)
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists: give another OUTPUT, or --overwrite to replace it")
    path = resolve(args.input)
    content = read_checkpoint(path)
    if args.ema:
        content = take_averages(content, path)
    content, summary = convert(content, args.to, path)
    if args.dtype:
        weights, num_kept = round_weights(content["model"], _DTYPES[args.dtype])
        content["model"] = weights
        summary += f"; weights in {args.dtype}"
        summary += f", but {num_kept} arrays, which it cannot represent" if num_kept else ""
    write_atomically(output, writer_of(output, content))
    print(f"{output}: {summary}")
    return 0
