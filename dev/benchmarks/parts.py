"""What a call spends its time in: its parts, and the rest that none of them explains."""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .timing import synchronize

# The name under which the time is counted, which several parts may share; and the object and the
# name of its attribute that hold the function.
Part = tuple[str, Any, str]
REST, WHOLE = "rest", "whole"


@contextlib.contextmanager
def timed_parts(
    parts: Sequence[Part], device: str | torch.device = "cpu"
) -> Iterator[dict[str, float]]:
    """Count the time of functions, until the end of the block.

    Of a generator the steps are counted. On a GPU the device is idle before and after each part, so
    that the whole takes longer.

    Yields:
        the seconds spent in each part, without those in parts that it calls.

    Raises:
        AttributeError: a part is not there.
    """
    seconds = {name: 0.0 for name, *_ in parts}
    within = [0.0]  # per open part the time of the parts that it has called

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        synchronize(device)
        within.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(device)
            elapsed = time.perf_counter() - start
            seconds[name] += elapsed - within.pop()
            within[-1] += elapsed

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock(name):
                result = function(*args, **kwargs)
            return timed_steps(name, result) if inspect.isgenerator(result) else result

        return call

    def timed_steps(name: str, generator: Generator) -> Iterator[Any]:
        while True:
            with clock(name):
                try:
                    item = next(generator)
                except StopIteration:
                    return
            yield item

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in parts:
            function = getattr(owner, attribute)
            if attribute in vars(owner):
                stack.callback(setattr, owner, attribute, function)
            else:  # a method: it is the class's
                stack.callback(delattr, owner, attribute)
            setattr(owner, attribute, timed(name, function))
        yield seconds


def module_part(name: str, module: nn.Module) -> Part:
    """A module as a part, also one that is compiled."""
    return name, module, "_compiled_call_impl" if module._compiled_call_impl else "forward"


def measure_parts(
    call: Callable[[], object],
    parts: Sequence[Part],
    *,
    rounds: int,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """The parts of a call as rows `{"part", "ms", "share"}`, and below them the rest and the whole.

    Times are medians over the rounds, and the rest is that of the whole less those of all parts.
    """
    per_round, whole = [], []
    for _ in range(rounds):
        with timed_parts(parts, device) as seconds:
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            whole.append(time.perf_counter() - start)
        per_round.append(seconds)
    total = statistics.median(whole)
    medians = {name: statistics.median(r[name] for r in per_round) for name in per_round[0]}
    medians |= {REST: total - sum(medians.values()), WHOLE: total}
    return [
        {"part": name, "ms": 1e3 * time, "share": time / total} for name, time in medians.items()
    ]
