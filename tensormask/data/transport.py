"""How a worker process hands over a batch: as one `bytes` object, with masks as bits.

Tensors would cross in shared memory, which is limited by `/dev/shm` (64 MB in a container, by
default) and by the number of open files. Bytes cross through the pipe of the `DataLoader`, about as
fast, because a batch is small: a mask is sent as the bits within its extent, and all other tensors
and arrays as they are.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.tv_tensors import TVTensor


def pack(value: Any) -> bytes:
    """Convert an object to bytes.

    Masks are tensors `(..., H, W)` on the CPU of at least three dimensions that are bool, or uint8
    with no value above 1.

    Raises:
        Exception: something in it cannot be pickled.
    """
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()


def unpack(data: bytes) -> Any:
    """Restore the object of `pack`; only for bytes of a process that this one has started."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    """Pickles plain tensors as arrays, and masks as bits."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, TVTensor):
            return _restore_tv_tensor, (obj.as_subclass(torch.Tensor), type(obj), vars(obj))
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return NotImplemented
        if _is_mask(obj):
            return _unpack_masks, (tuple(obj.shape), obj.dtype, *_pack_masks(obj))
        # Not `reshape`: strides of empty tensors can be anything.
        flat = obj.contiguous().as_strided((obj.numel(),), (1,))
        array = flat.view(torch.uint8).numpy()
        return _restore_tensor, (array, obj.dtype, tuple(obj.shape))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is its shape, dtype and values, and nothing else."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized)
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _is_mask(tensor: torch.Tensor) -> bool:
    if tensor.ndim < 3 or tensor.dtype not in (torch.bool, torch.uint8) or not tensor.numel():
        return False
    return tensor.dtype == torch.bool or int(tensor.max()) <= 1


def _restore_tensor(array: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(array).view(dtype).reshape(shape)


def _restore_tv_tensor(
    tensor: torch.Tensor, cls: type[TVTensor], attributes: dict[str, Any]
) -> TVTensor:
    restored = tensor.as_subclass(cls)
    vars(restored).update(attributes)
    return restored


def _pack_masks(masks: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the extents `(K, 4)` of masks, rows (y0, y1, x0, x1), and the bits in them, uint8.

    K is the product of all dimensions but the last two. Each mask begins with a new byte.
    """
    planes = masks.contiguous().reshape(-1, *masks.shape[-2:]).numpy().view(np.bool_)
    extents = np.zeros((len(planes), 4), dtype=np.int64)
    bits = [np.zeros(0, dtype=np.uint8)]
    has_pixels = np.logical_or.reduce(planes, axis=2)  # (K, H)
    for k in np.flatnonzero(has_pixels.any(axis=1)):
        y0, y1 = _bounds(has_pixels[k])
        x0, x1 = _bounds(np.logical_or.reduce(planes[k, y0:y1], axis=0))
        extents[k] = y0, y1, x0, x1
        bits.append(np.packbits(planes[k, y0:y1, x0:x1]))
    return extents, np.concatenate(bits)


def _bounds(flags: np.ndarray) -> tuple[int, int]:
    """Return the index of the first true value and that after the last one."""
    return int(flags.argmax()), len(flags) - int(flags[::-1].argmax())


def _unpack_masks(
    shape: Sequence[int], dtype: torch.dtype, extents: np.ndarray, bits: np.ndarray
) -> torch.Tensor:
    """Restore masks of any `shape` from the extents and bits of `_pack_masks`."""
    planes = np.zeros((len(extents), *shape[-2:]), dtype=np.uint8)
    start = 0
    for plane, (y0, y1, x0, x1) in zip(planes, extents.tolist(), strict=True):
        size = (y1 - y0) * (x1 - x0)
        end = start + -(-size // 8)
        pixels = np.unpackbits(bits[start:end], count=size)
        plane[y0:y1, x0:x1] = pixels.reshape(y1 - y0, x1 - x0)
        start = end
    return torch.from_numpy(planes).view(dtype).reshape(shape)
