"""A model on fake tensors of a GPU under CUDA's own autocast; prints its dtypes as JSON.

Fake tensors have a device, a dtype and a shape, but no values. PyTorch asks the CUDA runtime about
the device, which `RUNTIME`, preloaded, answers without a GPU.

Usage: LD_PRELOAD=libcuda.so.1 python tests/fake_cuda.py
"""

import json
from unittest import mock

import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tensormask import TensorMask
from tensormask.layers import _native
from tensormask.modeling.box_losses import box_loss
from tensormask.modeling.losses import focal_loss_star, mask_loss

RUNTIME = """
#define SUCCEED(name) int name(void) { return 0; }
SUCCEED(cudaSetDevice) SUCCEED(cudaGetLastError) SUCCEED(cudaPeekAtLastError)
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = *high = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
"""


def main() -> None:
    cudnn = torch._C._ConvBackend.Cudnn
    patches = [
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch._C, "_select_conv_backend", return_value=cudnn),
        mock.patch.object(_native, "DEVICES", _native.DEVICES | {"cuda"}),
    ]
    for patch in patches:
        patch.start()
    results = {}
    cases = [(head, torch.bfloat16) for head in ("natural", "aligned", "bipyramid")]
    for head, dtype in [*cases, ("bipyramid", torch.float16)]:
        model = tiny.build(head)
        with FakeTensorMode(allow_non_fake_inputs=True):
            results[f"{head}, {dtype}"] = dtypes_of(to_gpu(model), dtype)
    print(json.dumps(results))


def to_gpu(model: TensorMask) -> TensorMask:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty_like(value, device="cuda")
                module._parameters[name] = nn.Parameter(fake, value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device="cuda")
    return model


def dtypes_of(model: TensorMask, dtype: torch.dtype) -> dict[str, list[str]]:
    """Run the dense part, the heads at windows, the losses and the backward pass."""
    windows, index = (torch.empty(5, n, dtype=torch.int64, device="cuda") for n in (3, 4))
    with torch.autocast("cuda", dtype):
        features = model.fpn(list(model.backbone(torch.empty(2, 3, 128, 160, device="cuda"))))
        logits, deltas = model.head(features)
        sizes = range(model.windows.num_sizes)
        groups = [(level, size, windows) for level in range(3) for size in sizes]
        masks = model.mask_head(features, groups)
        targets = [torch.empty_like(mask, dtype=torch.bool) for mask in masks]
        of_box = deltas[0].unflatten(1, (-1, 4))[
            index[:, 0], index[:, 1], :, index[:, 2], index[:, 3]
        ]
        losses = [
            focal_loss_star(logits, [index.unbind(1)] * len(logits)),
            box_loss(of_box, torch.empty(5, 4, device="cuda")),
            *map(mask_loss, masks, targets),
        ]
    sum(losses).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    named = {"features": features, "logits": logits, "deltas": deltas, "masks": masks}
    named |= {"losses": losses, "gradients": gradients}
    assert all(x.is_cuda for tensors in named.values() for x in tensors)
    return {name: sorted({str(x.dtype) for x in tensors}) for name, tensors in named.items()}


if __name__ == "__main__":
    main()
