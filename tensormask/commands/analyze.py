"""Count a model's parameters, FLOPs and activations: `tensormask analyze --config-file FILE`.

The model runs on the meta device: only shapes are computed, which takes seconds at any size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.checkpoint.trained import find_trained_model
from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    add_size,
    exits_on_user_error,
    read_config,
    write_json,
)
from tensormask.commands.synthetic import objects_per_level
from tensormask.config import CfgNode
from tensormask.data import build_test_loader, get_dataset
from tensormask.engine.resume import write_torch as write_checkpoint
from tensormask.evaluation.query import query_table
from tensormask.layers import op_backend
from tensormask.modeling import TensorMask, build_model
from tensormask.modeling.inputs import padded_size
from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_records

REST = "rest"
_BYTES_PER_MIB = 2**20
_BYTES_PER_VALUE = 4  # float32


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "analyze",
        description="Count a model's parameters and, for one image, its FLOPs (two per "
        "multiplication with addition) and activations (float32 outputs of convolutions and "
        "matrix products): with masks at all windows, and at TEST.DETECTIONS_PER_IMAGE windows "
        "on the levels of objects of COCO's sizes.",
        example="--config-file tensormask_R_50_FPN_1x MODEL.TENSOR_MASK.HEAD simple_natural",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    add_config_file(model, default="")
    add_size(parser)
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file, too")
    model.add_argument(
        "--query", metavar="CHECKPOINT", help="a trained model with a query, for its threshold"
    )
    query = parser.add_argument_group(
        "the threshold of a query (MODEL.TENSOR_MASK.QUERY_ON)",
        "Instead of counting, measure on DATASETS.TEST the recall of positive windows of the "
        "finest level, the share of it that is computed, time and AP.",
    )
    query.add_argument(
        "--recalls", type=float, nargs="+", default=[0.95, 0.98, 0.99, 0.995], metavar="R"
    )
    query.add_argument(
        "--store",
        type=float,
        metavar="R",
        help="store the threshold of this recall, such as 0.99, into the checkpoint",
    )
    add_overrides(parser)
    return parser


def analyze(cfg: CfgNode, size: tuple[int, int]) -> dict[str, Any]:
    """Count a config's model for an image of `size` (height, width).

    Returns:
        `parameters`, their number; `parts`, rows of the table of parts, the last one is the sum;
        `levels`, rows of the table of levels.

    Raises:
        UserError: an image without pixels, or a config that is no TensorMask.
    """
    if min(size) < 1:
        raise UserError(f"--size must be positive, got {size[0]} {size[1]}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg).eval()
        image = torch.zeros(1, 3, *padded_size(*size, model.size_divisor))
        with torch.no_grad(), op_backend("reference"):
            levels, groups = _windows(model, size)
            at_windows = count(model, lambda: _run(model, image, groups))
            everywhere = count(model, lambda: _run(model, image, None))
    parts = model_parts(model)
    names = [*parts, *([REST] if REST in everywhere or REST in at_windows else [])]
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "part": name,
            "parameters": sum(p.numel() for p in parts.get(name, nn.Module()).parameters()),
        }
        for title, counts in (("all", everywhere), ("some", at_windows)):
            flops, values = counts.get(name, (0, 0))
            row[f"{title}: GFLOP"] = flops / 1e9
            row[f"{title}: Mvalues"] = values / 1e6
            row[f"{title}: MiB"] = values * _BYTES_PER_VALUE / _BYTES_PER_MIB
        rows.append(row)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "part"}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parts": [*rows, {"part": "sum", **total}],
        "levels": levels,
    }


def model_parts(model: TensorMask) -> dict[str, nn.Module]:
    """Return the modules that are counted, by name; together they have all parameters."""
    parts = {"backbone": model.backbone, "fpn": model.fpn}
    for head in (model.head, model.mask_head):
        parts |= dict(head.named_children()) if head is not None else {}
    return parts


def count(model: TensorMask, call: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """Return the FLOPs and values of activations in a call by part; the rest is in no part."""
    counter, handles = _Counter(), []

    def leave(*_: Any) -> None:
        counter.running.pop()

    for name, module in model_parts(model).items():
        # A list of modules is never called itself.
        for called in module if isinstance(module, nn.ModuleList) else [module]:
            handles += [
                called.register_forward_pre_hook(
                    lambda *_, name=name: counter.running.append(name)
                ),
                called.register_forward_hook(leave),
            ]
    with counter:
        call()
    for handle in handles:
        handle.remove()
    return counter.counts


class _Counter(TorchDispatchMode):
    """Counts products for the innermost part that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [REST]
        self.counts: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        flops_of = flop_registry.get(function.overloadpacket)
        if flops_of is not None:
            flops, values = self.counts.get(self.running[-1], (0, 0))
            flops += flops_of(*args, **kwargs, out_val=result)
            self.counts[self.running[-1]] = flops, values + result.numel()
        return result


def _run(model: TensorMask, image: Tensor, groups: list[tuple[int, int, Tensor]] | None) -> None:
    """Run a model from the backbone to the heads, with masks of the groups (None: of all)."""
    features = model.fpn(model.backbone(image))
    model.head(features)
    if model.mask_head is not None:
        model.mask_head.dense(features) if groups is None else model.mask_head(features, groups)


def _windows(
    model: TensorMask, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[tuple[int, int, Tensor]]]:
    """Return the rows of the table of levels, and as many windows as detections, in groups."""
    windows, (height, width) = model.windows, padded_size(*size, model.size_divisor)
    largest = [max(sides) for sides in windows.sizes]
    chosen = objects_per_level(largest, size, model.num_detections)
    rows, groups = [], []
    for level, (stride, sides, number) in enumerate(
        zip(windows.strides, windows.sizes, chosen, strict=True)
    ):
        grid = (-(-height // stride), -(-width // stride))
        row = {
            "level": f"p{windows.levels[level]}",
            "stride": stride,
            "grid": f"{grid[0]} x {grid[1]}",
            "window px": ", ".join(f"{side:g}" for side in sides),
            "windows": grid[0] * grid[1] * windows.num_sizes,
            "with detections": number,
        }
        if model.mask_head is not None:
            mask_sides = [side * model.mask_head.lambdas[level] for side in windows.mask_sizes]
            values = sum(side**2 for side in mask_sides) * grid[0] * grid[1]
            row["mask px"] = ", ".join(map(str, mask_sides))
            row["masks of all, MiB"] = values * _BYTES_PER_VALUE / _BYTES_PER_MIB
        rows.append(row)
        for i in range(windows.num_sizes):  # as many of each size
            count_of_size = (number + i) // windows.num_sizes
            if count_of_size:
                groups.append((level, i, torch.zeros(count_of_size, 3, dtype=torch.int64)))
    return rows, groups


def analyze_query(
    checkpoint: str, recalls: Sequence[float], stored: float | None, overrides: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return the rows of `query_table`; write the threshold of the recall ``stored`` to the file.

    Raises:
        UserError: a recall is no share, or the model has no query.
    """
    recalls = [*recalls, *([] if stored is None or stored in recalls else [stored])]
    if not all(0 < recall <= 1 for recall in recalls):
        raise UserError(f"a recall must be a share in 0..1, such as 0.99, got {recalls}")
    trained = find_trained_model(checkpoint, None, overrides)
    model = build_model(trained.cfg)
    if model.head.query is None:
        raise UserError(f"{checkpoint} has no query (MODEL.TENSOR_MASK.QUERY_ON is False)")
    loaded = load_weights(model, trained.path, content=trained.content)
    check_complete(loaded, trained.path)
    if not trained.cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a set for the measurement")
    dataset = get_dataset(trained.cfg.DATASETS.TEST[0])
    rows = query_table(model, build_test_loader(trained.cfg, dataset), dataset, recalls)
    if stored is not None:
        threshold = rows[1 + recalls.index(stored)]["threshold"]
        weights = {**trained.content["model"], "head.query.threshold": torch.tensor(threshold)}
        write_checkpoint(trained.path, {**trained.content, "model": weights})
        print(f"Stored in {trained.path}: the threshold {threshold:.4g}")
    return rows


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    if args.query:
        rows = analyze_query(args.query, args.recalls, args.store, args.opts)
        write_json(args.json, {"query": rows})
        print(format_records(rows))
        return 0
    cfg = read_config(args.config_file, args.opts)
    height, width = args.size
    results = analyze(cfg, (height, width))
    write_json(args.json, results)
    print(
        f"{results['parameters'] / 1e6:.1f} M parameters; an image of {height} x {width} px, with "
        f"masks at all windows and at those of {cfg.TEST.DETECTIONS_PER_IMAGE} detections (some)"
    )
    print(format_records(results["parts"]))
    print()
    print(format_records(results["levels"]))
    return 0
