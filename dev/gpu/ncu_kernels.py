"""Calls of the CUDA kernels for Nsight Compute (ncu): dense and at windows, by dtype and lambda."""

import torch

import gpu  # noqa: F401 (makes tensormask importable)
from tensormask.layers import swap_align2nat  # noqa: F401 (loads the library)

ops = torch.ops.tensormask
HEIGHT, WIDTH, SIDE = 200, 336, 15

for dtype in (torch.float32, torch.bfloat16):
    for ratio in (1, 4, 32):
        maps = torch.randn(1, SIDE**2, HEIGHT, WIDTH, device="cuda", dtype=dtype)
        limits = (1, -(-HEIGHT // ratio), -(-WIDTH // ratio))
        windows = torch.stack([torch.randint(n, (17,)) for n in limits], 1).cuda()
        masks = ops.swap_align2nat_at(maps, windows, ratio, -6.0)
        size = (1, HEIGHT, WIDTH)
        ops.swap_align2nat_at_backward(torch.randn_like(masks), windows, ratio, *size)
        dense = ops.swap_align2nat(maps, ratio, -6.0)
        ops.swap_align2nat_backward(torch.randn_like(dense), ratio, HEIGHT, WIDTH)
torch.cuda.synchronize()
