"""A pretended GPU: tensors that say "cuda" and are computed on the CPU; host waits are counted.

On a GPU, the host queues work and continues. It waits where it needs a result, for example for
`item()`, for an index by a mask, or to copy from memory that is not pinned. Within `pretend()`, a
tensor is on the pretended GPU if its storage was made or moved there. Every operation is recorded:

    with pretend() as record:
        model = build_model(cfg)  # MODEL.DEVICE "cuda"
        record.clear()
        model(images)
    assert not record.mixes
    assert record.waits.total() == 4, record.waits

Blind spots: times, memory, and hooks of the backward pass, which see tensors of the CPU. Autocast
is the CPU's; `fake_cuda.py` has CUDA's.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretended_patches import CPU, CUDA, patches
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).parents[1]
_PLACES = (f"{_ROOT}/tensormask/", f"{_ROOT}/dev/", f"{_ROOT}/tests/")

# Operations whose result has a size, or is a number, that the host reads from the GPU.
_WAITING = {
    "aten::_local_scalar_dense", "aten::bincount", "aten::equal", "aten::masked_select",
    "aten::nonzero", "aten::unique_consecutive", "aten::unique_dim", "aten::_unique2",
    "torchvision::nms",
}  # fmt: skip
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::copy", "aten::_copy_from"}
_WITHOUT_KERNELS = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")
# Functions whose result is on the CPU unless they are given a device, and those that copy numbers.
_CREATING = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
}  # fmt: skip
_FROM_NUMBERS = {"tensor", "as_tensor", "new_tensor"}


@dataclass
class Record:
    """What has happened since the last `clear`, by operation and place in our code.

    Attributes:
        waits: of the host for the GPU.
        mixes: operations on tensors of both devices. On a GPU they raise an error.
        pinned: copies from pinned memory, for which the host does not wait.
        unpinned: copies with `non_blocking` from other memory, for which it may wait.
        launches: operations that are at least a kernel on a GPU, with copies.
        num_bytes: that these read and write.
    """

    waits: Counter[str] = field(default_factory=Counter)
    mixes: Counter[str] = field(default_factory=Counter)
    pinned: Counter[str] = field(default_factory=Counter)
    unpinned: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def clear(self) -> None:
        vars(self).update(vars(Record()))

    def totals(self) -> dict[str, int]:
        return {name: x.total() for name, x in vars(self).items() if isinstance(x, Counter)}


@contextlib.contextmanager
def pretend() -> Iterator[Record]:
    """Pretend a GPU, `torch.device("cuda")`, within the block. Not for several threads."""
    storages = _Storages()
    record = Record()
    with contextlib.ExitStack() as stack:
        functions = _Functions(storages, record)
        for target, name, value in patches(storages, functions):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(functions)
        stack.enter_context(_Operations(storages, record))
        yield record


class _Storages:
    """The storages on the pretended GPU, and those in pinned memory."""

    def __init__(self) -> None:
        # A weak reference keeps the address of a storage from being used again.
        self._references: dict[str, dict[int, StorageWeakRef]] = {"cuda": {}, "pinned": {}}
        self._num_added = 0
        # The device of the function that is running, for operations without tensors.
        self.device_of_call: list[bool] = []
        self.is_recorded = True

    def add(self, value: Any, place: str = "cuda") -> Any:
        """Put all tensors in nested lists into a place; return them."""
        for x in tensors_of(value):
            storage = x.untyped_storage()
            self._references[place][storage._cdata] = StorageWeakRef(storage)
            self._num_added += 1
            if self._num_added % 10_000 == 0:
                for kind, references in self._references.items():
                    alive = {k: ref for k, ref in references.items() if not ref.expired()}
                    self._references[kind] = alive
        return value

    def remove(self, value: Any) -> Any:
        for x in tensors_of(value):
            self._references["cuda"].pop(x.untyped_storage()._cdata, None)
        return value

    def on_cuda(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._references["cuda"]

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._references["pinned"]

    def any_on_cuda(self, value: Any) -> bool:
        return any(map(self.on_cuda, tensors_of(value)))

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        before, self.is_recorded = self.is_recorded, False
        try:
            yield
        finally:
            self.is_recorded = before

    @contextlib.contextmanager
    def calling(self, *, on_cuda: bool) -> Iterator[None]:
        self.device_of_call.append(on_cuda)
        try:
            yield
        finally:
            self.device_of_call.pop()


class _Operations(TorchDispatchMode):
    """Record the operations that the dispatcher runs, also those of the backward pass."""

    def __init__(self, storages: _Storages, record: Record) -> None:
        super().__init__()
        self.storages, self.record = storages, record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, storages = kwargs or {}, self.storages
        inputs = tensors_of((args, kwargs))
        on_cuda = any(map(storages.on_cuda, inputs))
        out = func(*args, **kwargs)
        if not inputs:
            on_cuda = bool(storages.device_of_call) and storages.device_of_call[-1]
        if not on_cuda:
            return out
        name = func._schema.name
        if storages.is_recorded:
            self._check(name, args, kwargs, inputs)
            if not _has_no_kernel(func):
                self.record.launches[f"{name} at {_place()}"] += 1
                self.record.num_bytes += sum(map(_num_bytes, [*inputs, *tensors_of(out)]))
        in_place = name.endswith("_") and isinstance(args[0], Tensor)
        if not in_place or storages.on_cuda(args[0]):
            storages.add(out)
        return out

    def _check(self, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        storages, record = self.storages, self.record
        at = f"{name} at {_place()}"
        if name in _WAITING:
            record.waits[at] += 1
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            record.waits[at] += 1
        if name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")) and (
            isinstance(args[1], (list, tuple))
        ):
            # Indices may be on the CPU; values of one element as well.
            for index in tensors_of(args[1]):
                if index.dtype in (torch.bool, torch.uint8):
                    record.waits[f"index by a mask, {at}"] += 1
                if not storages.on_cuda(index):
                    record.waits[f"index on the CPU, {at}"] += 1
            inputs = [args[0], *(x for x in args[2:3] if isinstance(x, Tensor) and x.dim())]
        elif name in _COPIES:
            same = len({storages.on_cuda(x) for x in inputs}) == 1
            if not same and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                record.waits[at] += 1
            return
        # A number on the CPU may be an operand of tensors on a GPU.
        devices = {storages.on_cuda(x) for x in inputs if x.dim()}
        numbers = {storages.on_cuda(x) for x in inputs if not x.dim()}
        if len(devices) > 1 or (devices == {False} and True in numbers):
            shapes = [(*x.shape,) for x in inputs if not storages.on_cuda(x)]
            record.mixes[f"{at}: on the CPU {shapes}"] += 1


class _Functions(TorchFunctionMode):
    """Answer what Python asks about devices, and copy between them."""

    def __init__(self, storages: _Storages, record: Record) -> None:
        super().__init__()
        self.storages, self.record = storages, record
        self._handlers: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda x: CUDA if storages.on_cuda(x) else CPU,
            Tensor.is_cuda.__get__: storages.on_cuda,
            Tensor.is_cpu.__get__: lambda x: not storages.on_cuda(x),
            Tensor.get_device: lambda x: 0 if storages.on_cuda(x) else -1,
            Tensor.is_pinned: lambda x, *_: storages.is_pinned(x),
            Tensor.pin_memory: self._pin,
            Tensor.to: self._to,
            Tensor.cuda: lambda x, device=None, **options: self._move(x, CUDA, **options),
            Tensor.cpu: lambda x, **options: self._move(x, CPU, **options),
            Tensor.tolist: self._tolist,
            Tensor.numpy: self._numpy,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, storages = dict(kwargs or {}), self.storages
        if handler := self._handlers.get(func):
            return handler(*args, **kwargs)
        name = getattr(func, "__name__", "")
        device = kwargs.pop("device", None)
        if device is not None:
            on_cuda = torch.device(device).type == "cuda"
        else:
            on_cuda = name not in _CREATING and storages.any_on_cuda((args, kwargs))
        if on_cuda and name in _FROM_NUMBERS:
            return self._make(func, args, kwargs)
        with storages.calling(on_cuda=on_cuda):
            out = func(*args, **kwargs)
        if device is not None:
            (storages.add if on_cuda else storages.remove)(out)
        return out

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Make a tensor from numbers of the host, or of a tensor there, on the GPU."""
        if isinstance(args[0], Tensor) and func is not Tensor.new_tensor:
            return self._move(args[0], CUDA, kwargs.get("dtype"))
        with self.storages.unrecorded(), self.storages.calling(on_cuda=False):
            out = func(*args, **kwargs)
        self.record.waits[f"{func.__name__} at {_place()}"] += 1
        self.record.launches[f"copy to the GPU at {_place()}"] += 1
        return self.storages.add(out)

    def _pin(self, x: Tensor, *_: Any) -> Tensor:
        if self.storages.on_cuda(x):
            self.record.mixes[f"pin_memory at {_place()}"] += 1
        return self.storages.add(x.clone(), "pinned")

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options, flags = dict(kwargs), []
        for value in [*args, kwargs.pop("other", None)]:
            if isinstance(value, Tensor):
                options["device"] = CUDA if self.storages.on_cuda(value) else CPU
                options["dtype"] = value.dtype
            elif isinstance(value, torch.dtype):
                options["dtype"] = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                options["device"] = value
        options |= dict(zip(("non_blocking", "copy"), flags, strict=False))
        options.pop("other", None)
        with self.storages.calling(on_cuda=self.storages.on_cuda(x)):
            return self._move(x, options.pop("device", None), **options)

    def _move(
        self,
        x: Tensor,
        device: Any,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
        copy: bool = False,
        **options: Any,  # memory_format
    ) -> Tensor:
        storages, record = self.storages, self.record
        on_cuda = storages.on_cuda(x)
        if device is None or (torch.device(device).type == "cuda") == on_cuda:
            with torch._C.DisableTorchFunction():
                return x.to(dtype or x.dtype, copy=copy, **options)
        with storages.unrecorded(), torch._C.DisableTorchFunction():
            out = x.to(dtype or x.dtype, copy=True, **options)
        place = _place()
        record.launches[f"copy at {place}"] += 1
        if on_cuda:
            record.waits[f"copy to the CPU at {place}"] += 1
            if non_blocking:
                record.mixes[f"read before it is copied at {place}"] += 1
            return storages.remove(out)
        if not non_blocking:
            record.waits[f"copy to the GPU at {place}"] += 1
        elif storages.is_pinned(x):
            record.pinned[f"copy to the GPU at {place}"] += 1
        else:
            record.unpinned[f"copy to the GPU at {place}"] += 1
        return storages.add(out)

    def _tolist(self, x: Tensor) -> Any:
        if self.storages.on_cuda(x):
            self.record.waits[f"tolist at {_place()}"] += 1
        with self.storages.unrecorded(), torch._C.DisableTorchFunction():
            return x.tolist()

    def _numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.storages.on_cuda(x):
            self.record.mixes[f"numpy at {_place()}"] += 1
        with torch._C.DisableTorchFunction():
            return x.numpy(*args, **kwargs)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _has_no_kernel(func: Any) -> bool:
    """Whether an operation only reserves memory, or describes memory that exists."""
    if func._schema.name.startswith(_WITHOUT_KERNELS):
        return True
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _num_bytes(x: Tensor) -> int:
    sides = [side for side, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * math.prod(sides)


def _place() -> str:
    """Return file and line of the innermost code of ours that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PLACES) and name != __file__:
            return f"{Path(name).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
