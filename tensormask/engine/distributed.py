"""Communication between the processes (ranks) of a run; `launch.py` starts the processes.

In a single process, every function here does nothing or returns its argument, so that callers need
no special case. With several processes, all must make the same calls in the same order.
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
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tensormask.config import CfgNode
from tensormask.modeling import TensorMask
from tensormask.modeling.build import resolve_device
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

# Limits of the wait for a rank that hangs; a rank that dies ends the run at once, by its closed
# connections and its launcher. Objects have a longer limit, since other ranks wait for them while
# one rank works: while rank 0 scores a large data set, downloads a file or writes a checkpoint.
TIMEOUT = timedelta(minutes=30)
OBJECTS_TIMEOUT = timedelta(days=2)
_objects_group: dist.ProcessGroup | None = None  # None: the default group
_PR_SET_PDEATHSIG = 1  # of Linux: the signal to get when the parent dies


def start(device: str) -> None:
    """Join the process group if `torchrun` or `launch` has started this process.

    They set the environment variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and LOCAL_RANK,
    the rank on this machine. Gloo connects processes on CPUs; NCCL connects processes on GPUs, each
    of which uses the GPU with the number LOCAL_RANK.

    Raises:
        UserError: `MODEL.DEVICE` names a single GPU for all processes, or there are too few GPUs.
    """
    global _objects_group
    if not is_launched():
        return
    rank, local_rank = int(os.environ["RANK"]), _local_rank()
    on_gpu = resolve_device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(_own_gpu(device, local_rank))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=OBJECTS_TIMEOUT)
    _objects_group = cast(dist.ProcessGroup, group)
    sys.excepthook = _print_traceback
    if rank > 0:
        _log_errors_only()
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # If the agent dies, which would stop this process, the kernel kills it. Not SIGTERM, which
        # would be sent when any thread of the agent ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def is_launched() -> bool:
    """Return whether `torchrun`, `launch` or a similar launcher has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def stop() -> None:
    """Leave the process group at the end of a run."""
    global _objects_group
    _objects_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes the files and the log."""
    return get_rank() == 0


def wrap(model: nn.Module, reduce_dtype: str = "") -> nn.Module:
    """Wrap a model such that its backward pass averages the gradients over all ranks.

    With `reduce_dtype` "bfloat16" the ranks exchange gradients in it, half of the bytes; "" is the
    dtype of the weights.

    All parameters get rank 0's values. Every parameter must receive a gradient in every backward
    pass on every rank. Buffers are not synchronized: see `sync_buffers`.

    Returns:
        A DistributedDataParallel model; in a single process, `model` itself.

    Raises:
        UserError: the model has SyncBN, which supports GPUs only, and is on the CPU; or
            `reduce_dtype` is another one.
    """
    if reduce_dtype not in ("", "bfloat16"):
        raise UserError(f"SOLVER.REDUCE_DTYPE must be '' or 'bfloat16', got {reduce_dtype!r}")
    if not dist.is_initialized():
        return model
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "SyncBN works on GPUs only, and the processes are on the CPU: set MODEL.RESNETS.NORM "
            "to GN, BN or FrozenBN"
        )
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Not an argument, which has another name since PyTorch 2.13.
    wrapped.broadcast_buffers = False
    if reduce_dtype:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def unwrap(model: nn.Module) -> TensorMask:
    """Return the model that was passed to `wrap`."""
    return cast(TensorMask, model.module if isinstance(model, DistributedDataParallel) else model)


def sync_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: each rank has batch norm statistics of its own images.

    Training does not read them; an evaluation does, and a checkpoint has rank 0's.
    """
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until all ranks call this, for up to `OBJECTS_TIMEOUT`."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1), group=_objects_group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on its device; `tensor` is not changed."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, on its device; `tensor` is not changed."""
    return all_reduce_sum(tensor) / get_world_size() if dist.is_initialized() else tensor


def any_rank(flag: bool) -> bool:
    """Return in every rank whether the flag is set in any rank."""
    if not dist.is_initialized():
        return flag
    # Over NCCL where available: this is called in every iteration.
    on_gpu = "nccl" in dist.get_backend_config()
    return bool(all_reduce_sum(torch.tensor(float(flag), device="cuda" if on_gpu else "cpu")) > 0)


def gather_objects(value: Any) -> list[Any]:
    """Gather a small picklable object from every rank; every rank gets the list, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value, group=_objects_group)
    return values


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks, ordered by rank; fast if all are empty."""
    if not any_rank(bool(items)):
        return []
    return [item for of_rank in gather_objects(items) for item in of_rank]


def check_same(what: str, value: Any) -> None:
    """Raise UserError unless all ranks pass an equal `value`, a small picklable object."""
    for rank, other in enumerate(gather_objects(value)):
        if other != value:
            raise UserError(
                f"rank {rank} has another {what} than rank {get_rank()}: start all machines with "
                "the same command, and with an OUTPUT_DIR that is the same folder for all"
            )


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value`, a small picklable object, in every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_objects_group)
    return values[0]


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Run a block in the first process of each machine, and then in its other processes.

    For files that are created at first use: one process creates them, the others find them. If the
    block fails in the first process, the others do not wait, and fail themselves.
    """
    if _local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if _local_rank() == 0:
            barrier()


def scale_to_world_size(cfg: CfgNode) -> CfgNode:
    """Scale a config from `SOLVER.REFERENCE_WORLD_SIZE` processes to the actual number.

    As in detectron2, with s = actual / reference: batch size and learning rate are multiplied by s;
    MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are divided by s and
    rounded. REFERENCE_WORLD_SIZE becomes the actual number.

    Returns:
        A frozen copy; `cfg` itself if the reference is 0 (off) or the actual number.

    Raises:
        UserError: the reference is negative, or does not divide the batch size.
    """
    reference, world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, get_world_size()
    if reference in (0, world_size):
        return cfg
    if reference < 0 or cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must be 0 (off), or the number of "
            f"processes that the config is for, which must divide SOLVER.IMS_PER_BATCH, "
            f"{cfg.SOLVER.IMS_PER_BATCH}"
        )
    scale = world_size / reference

    def shortened(iterations: int) -> int:
        # At least 1, since 0 switches a period off.
        return max(1, round(iterations / scale)) if iterations > 0 else iterations

    cfg = cfg.clone()
    cfg.defrost()
    solver, test = cfg.SOLVER, cfg.TEST
    solver.IMS_PER_BATCH = solver.IMS_PER_BATCH // reference * world_size
    solver.BASE_LR *= scale
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = shortened(solver[key])
    test.EVAL_PERIOD = shortened(test.EVAL_PERIOD)
    solver.STEPS = tuple(shortened(step) for step in solver.STEPS)
    solver.REFERENCE_WORLD_SIZE = world_size
    cfg.freeze()
    logger.info(
        "Config scaled from %d processes to %d: SOLVER.IMS_PER_BATCH %d, BASE_LR %g, "
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
            f"MODEL.DEVICE is {device!r}, but each process needs a GPU of its own: set it to "
            "'cuda' or 'auto', and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"no GPU for process {local_rank + 1} of this machine, which has {num_gpus}: start "
            "fewer processes (--num-gpus, torchrun's --nproc-per-node), or set MODEL.DEVICE 'cpu'"
        )
    return local_rank


def rank_prefix() -> str:
    """Return "rank 1: " or the like, the prefix of console lines if there are several ranks."""
    return f"rank {get_rank()}: " if get_world_size() > 1 else ""


def _log_errors_only() -> None:
    """Log errors of this rank to stderr; info comes from rank 0 only."""
    package = logging.getLogger("tensormask")
    package.setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{rank_prefix()}%(levelname)s %(message)s"))
    package.addHandler(handler)


def _print_traceback(*error: Any) -> None:
    """Print a traceback with the rank before each line: a `sys.excepthook`."""
    lines = "".join(traceback.format_exception(*error)).splitlines()
    sys.stderr.write("".join(f"{rank_prefix()}{line}\n" for line in lines))
