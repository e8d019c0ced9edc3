"""Several processes with one model: how they join, and what they say to each other.

A process that was started alone is rank 0 of 1, and every function here then does nothing or gives
back what it was given, so that callers need not ask. All processes must come to the same calls in
the same order. `launch.py` starts the processes.
"""

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensormask.config import CfgNode
from tensormask.modeling.build import resolve_device
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

# A process that dies is noticed at once, by its closed connections and by its launcher. This is for
# one that hangs, and has to be longer than rank 0's scoring of a large data set.
TIMEOUT = timedelta(minutes=30)
_PR_SET_PDEATHSIG = 1  # of Linux: a signal that comes when the parent dies


def start(device: str) -> None:
    """Join the processes of `torchrun` or `launch`, if one of them has started this one.

    They say so in the environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and LOCAL_RANK, the
    number on the own machine. Gloo connects processes on CPUs, NCCL those on GPUs, each of which
    takes the GPU of its LOCAL_RANK.

    Args:
        device: `MODEL.DEVICE`.

    Raises:
        ValueError: one GPU is named for all processes, or there are fewer GPUs than processes.
    """
    if not is_launched():
        return
    rank, local_rank = int(os.environ["RANK"]), _local_rank()
    on_gpu = resolve_device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(_own_gpu(device, local_rank))
    # Gloo besides NCCL: objects stay on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    sys.excepthook = _print_traceback
    if rank > 0:
        _say_errors_only()
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # Without the agent, which would have stopped it, no process shall stay behind. Not SIGTERM,
        # which would come for each thread of the agent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def is_launched() -> bool:
    """Whether `torchrun`, `launch` or their like has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def stop() -> None:
    """Leave the other processes, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes, on all machines together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, the one that writes files and the log."""
    return get_rank() == 0


def wrap(model: nn.Module) -> nn.Module:
    """The model whose backward averages the gradients over all processes; alone, `model` itself.

    Its parameters are those of `model`, from now on with rank 0's values. Every parameter must get
    a gradient in every backward, on every rank. Buffers are not kept equal: see `sync_buffers`.

    Raises:
        ValueError: SyncBN, which exists on GPUs only, in a model on the CPU.
    """
    if not dist.is_initialized():
        return model
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "SyncBN works on GPUs only, and the processes are on the CPU: set MODEL.RESNETS.NORM "
            "to GN, BN or FrozenBN"
        )
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # in each forward; its argument has another name since 2.13
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """The model that `wrap` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers: a batch norm's statistics are of its own process's batches.

    Training does not read them; an evaluation does, and a checkpoint holds rank 0's.
    """
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device; `tensor` itself stays as it is."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on its device; `tensor` itself stays as it is."""
    return all_reduce_sum(tensor) / get_world_size() if dist.is_initialized() else tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all of them."""
    if not dist.is_initialized():
        return flag
    # Over the network of the GPUs where there is one: this is asked in every iteration.
    on_gpu = "nccl" in dist.get_backend_config()
    return bool(all_reduce_sum(torch.tensor(float(flag), device="cuda" if on_gpu else "cpu")) > 0)


def gather_objects(value: Any) -> list[Any]:
    """What each process has given, by rank, in all of them. Small plain objects only."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_lists(items: list[Any]) -> list[Any]:
    """The items of all processes, by rank, in all of them; quick where there are none."""
    if not any_rank(bool(items)):
        return []
    return [item for of_rank in gather_objects(items) for item in of_rank]


def check_same(what: str, value: Any) -> None:
    """Raise ValueError in all processes unless all have given the same, a small plain object."""
    for rank, other in enumerate(gather_objects(value)):
        if other != value:
            raise UserError(
                f"rank {rank} has another {what} than rank {get_rank()}: start all machines with "
                "the same command, and with an OUTPUT_DIR that is the same folder for all"
            )


def broadcast_object(value: Any) -> Any:
    """What rank 0 has given, in all processes. Small plain objects only."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Run a block in the first process of each machine, and only then in the others.

    For files that are made at first use: they are made once, and there when the others look. An
    error of the first is no one's wait: the others then run into it themselves.
    """
    if _local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if _local_rank() == 0:
            barrier()


def scale_to_world_size(cfg: CfgNode) -> CfgNode:
    """Fit a config to the number of processes if `SOLVER.REFERENCE_WORLD_SIZE` says its own.

    As in detectron2, with s processes for each one of the reference: batch and learning rate are
    multiplied by s; MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are
    divided by it and rounded. The reference is then the number of processes.

    Returns:
        `cfg` itself where there is nothing to change, else a frozen copy.

    Raises:
        ValueError: the reference is negative, or the batch does not divide by it.
    """
    reference, world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, get_world_size()
    if reference in (0, world_size):
        return cfg
    if reference < 0 or cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must be 0 (off), or the number of "
            f"processes that SOLVER.IMS_PER_BATCH, {cfg.SOLVER.IMS_PER_BATCH}, is meant for, and "
            "divide it"
        )
    scale = world_size / reference

    def shortened(iterations: int) -> int:
        # What is on stays on: a period of 0 would mean never.
        return max(1, round(iterations / scale)) if iterations > 0 else iterations

    cfg = cfg.clone()
    cfg.defrost()
    solver, test = cfg.SOLVER, cfg.TEST
    solver.IMS_PER_BATCH = solver.IMS_PER_BATCH // reference * world_size
    solver.BASE_LR *= scale
    for node, key in (
        *((solver, key) for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD")),
        (test, "EVAL_PERIOD"),
    ):
        node[key] = shortened(node[key])
    solver.STEPS = tuple(shortened(step) for step in solver.STEPS)
    solver.REFERENCE_WORLD_SIZE = world_size
    cfg.freeze()
    logger.info(
        "The config is for %d processes and there are %d: SOLVER.IMS_PER_BATCH %d, BASE_LR %g, "
        "MAX_ITER %d, STEPS %s, WARMUP_ITERS %d, CHECKPOINT_PERIOD %d, TEST.EVAL_PERIOD %d",
        *(reference, world_size, solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER),
        *(solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, test.EVAL_PERIOD),
    )
    return cfg


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _own_gpu(device: str, local_rank: int) -> int:
    if torch.device("cuda" if device == "auto" else device).index is not None:
        raise UserError(
            f"MODEL.DEVICE is {device!r}, but each process has a GPU of its own: write 'cuda' or "
            "'auto', and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank + 1} of this machine finds no GPU, there are {num_gpus}: start "
            "fewer (--num-gpus, torchrun's --nproc-per-node), or set MODEL.DEVICE to 'cpu'"
        )
    return local_rank


def rank_prefix() -> str:
    """What a line of this process begins with where those of several come together."""
    return f"rank {get_rank()}: " if get_world_size() > 1 else ""


def _say_errors_only() -> None:
    """What goes well is said by rank 0; an error is said by who has it."""
    package = logging.getLogger("tensormask")
    package.setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{rank_prefix()}%(levelname)s %(message)s"))
    package.addHandler(handler)


def _print_traceback(*error: Any) -> None:
    """A `sys.excepthook` whose lines say which process they are of."""
    lines = "".join(traceback.format_exception(*error)).splitlines()
    sys.stderr.write("".join(f"{rank_prefix()}{line}\n" for line in lines))
