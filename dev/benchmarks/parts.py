"""Divide the time of a call of a model among its parts, and the rest that belongs to none."""

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import nn
from torch.utils.benchmark import timer

from tensormask.modeling import TensorMask, mask_head, tensormask

# The name of the part, which several functions may share; the object and its attribute that hold
# a function.
Part = tuple[str, Any, str]


def measure_parts(
    call: Callable[[], object], parts: Sequence[Part], *, rounds: int
) -> list[dict[str, Any]]:
    """Return rows `{"part", "ms", "share"}`, the last two for the rest and the whole.

    Times are medians over the rounds. A part's time excludes the parts that it calls; parts that
    are not called are left out. A GPU is idle before and after each part, so that the whole takes
    longer than usual.
    """
    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]  # per open part, the time of the parts that it has called

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = timer()
            inner.append(0.0)
            result = function(*args, **kwargs)
            elapsed = timer() - start
            seconds[name] += elapsed - inner.pop()
            inner[-1] += elapsed
            return result

        return wrapped

    per_round: list[dict[str, float]] = []
    with ExitStack() as stack:
        for name, owner, attribute in parts:
            function = timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        for _ in range(rounds):
            seconds.clear()
            timed("rest", call)()
            per_round.append(dict(seconds))
    medians = {name: statistics.median(r[name] for r in per_round) for name in per_round[0]}
    medians["whole"] = statistics.median(sum(r.values()) for r in per_round)
    return [
        {"part": name, "ms": 1e3 * time, "share": time / medians["whole"]}
        for name, time in medians.items()
    ]


def parts_of(model: Any) -> list[Part]:
    """Return the parts of our model or of torchvision's Mask R-CNN in eval mode."""
    modules: dict[str, nn.Module]
    if isinstance(model, TensorMask):
        modules = {"backbone": model.backbone, "fpn": model.fpn, "class tower": model.head}
        # Of these, fast paths read the weights only; with another forward they would be called.
        not_called = [] if model.mask_head.aligned else ["mask_pred"]
        not_called += ["mask_fuse"] if model.device.type == "cpu" else []
        modules |= {
            f"mask head: {name}": module
            for name, module in model.mask_head.named_children()
            if name not in not_called
        }
        functions = [
            ("preprocess", model, "preprocess"),
            ("box tower", model.head, "outputs_at"),
            ("candidates and NMS", tensormask, "find_detections"),
            ("op at windows", mask_head, "swap_align2nat_at"),
            ("rest of the mask head, sigmoid", tensormask, "masks_at_windows"),
            ("paste", tensormask, "paste_detection"),
        ]
    else:
        modules = {"resize and normalize": model.transform, "backbone": model.backbone.body}
        modules |= {"fpn": model.backbone.fpn, "proposals": model.rpn}
        modules |= {f"heads: {name}": m for name, m in model.roi_heads.named_children()}
        modules["rest of the heads"] = model.roi_heads
        functions = [
            ("candidates and NMS", model.roi_heads, "postprocess_detections"),
            ("paste", model.transform, "postprocess"),
        ]
    for name, module in modules.items():
        # A list of modules is never called itself.
        for called in module if isinstance(module, nn.ModuleList) else [module]:
            compiled = called._compiled_call_impl is not None
            functions.append((name, called, "_compiled_call_impl" if compiled else "forward"))
    return functions
