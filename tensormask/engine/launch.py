"""Start the processes of a run, with the environment variables that `distributed.start` reads.

This uses `torchrun`'s agent, which monitors the processes, stops all if one dies, and forwards
signals.
"""

import re
import signal
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from tensormask.modeling.build import resolve_device
from tensormask.utils.errors import UserError

AUTO = "auto"


def check_launch(
    *, device: str, num_processes: int, num_machines: int, machine_rank: int, dist_url: str
) -> None:
    """Check the arguments of `launch`.

    Args:
        device: `MODEL.DEVICE`.
        num_processes: per machine; each process has its own GPU unless `device` is the CPU.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0.
        dist_url: `tcp://host:port` of machine 0; for a single machine also "auto", a free port.

    Raises:
        UserError: an invalid number or address, or too few GPUs.
    """
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-machines is {num_machines} and --machine-rank {machine_rank}: the machines are "
            f"numbered from 0 to {max(0, num_machines - 1)}"
        )
    if dist_url == AUTO and num_machines > 1:
        raise UserError(
            "--dist-url auto is for one machine: give all machines the address of machine 0 and a "
            "free port on it, such as --dist-url tcp://10.0.0.1:29500"
        )
    if dist_url != AUTO:
        _endpoint(dist_url)
    num_gpus = torch.cuda.device_count()
    on_cpu = resolve_device(device).type == "cpu"
    if num_processes > 1 and (device == AUTO if on_cpu else num_processes > num_gpus):
        raise UserError(
            f"--num-gpus is {num_processes}, but this machine has {num_gpus} available GPUs; "
            f"MODEL.DEVICE cpu starts {num_processes} processes on the CPU"
        )


def launch(
    command: Sequence[str],
    *,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = AUTO,
) -> int:
    """Run a command in `num_processes` processes of this machine, and wait for all of them.

    `check_launch` has the arguments.

    Returns:
        0 if all processes return 0; else the exit code of the first that fails (1 if a signal ended
        it), or 128 plus the number of the signal that stopped this process.

    Raises:
        UserError: the processes cannot connect through `dist_url`.
    """
    auto = dist_url == AUTO
    config = LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id="tensormask",  # equal on all machines; each run has its own store
        rdzv_backend="c10d" if auto else "static",
        rdzv_endpoint="localhost:0" if auto else _endpoint(dist_url),
        rdzv_configs={} if auto else {"rank": machine_rank},
        local_addr="localhost" if num_machines == 1 else None,
        max_restarts=0,
    )
    try:
        launch_agent(config, command[0], list(command[1:]))
    except dist.DistError as error:
        raise UserError(
            f"the processes cannot connect through --dist-url {dist_url}: {error}. Give the "
            "address of machine 0, and a free port on it that all machines can reach"
        ) from error
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = _first_failure(error)
        ended = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            ended = f"signal {signal.Signals(-failure.exitcode).name}"
        print(
            f"error: rank {rank} of {num_processes * num_machines} (process {failure.pid}) ended "
            f"with {ended}, and the others were stopped",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first, and how.

    The times are in whole seconds: of ranks that failed in the same one, those that a signal killed
    come first, since others fail when they lose the connection. SIGTERM is the launcher's.
    """

    def order(rank: int) -> tuple[int, bool]:
        failure = error.failures[rank]
        return failure.timestamp, failure.exitcode in (-signal.SIGTERM, *range(256))

    first = min(error.failures, key=order)
    return first, error.failures[first]


def _endpoint(dist_url: str) -> str:
    """Return `host:port` of an address."""
    match = re.fullmatch(r"tcp://([^/:\s]+|\[[0-9a-fA-F:]+\]):([1-9][0-9]{0,4})/?", dist_url)
    if not match or int(match[2]) > 65535:
        raise UserError(f"--dist-url is {dist_url!r}; it must be auto or tcp://host:port")
    return f"{match[1]}:{match[2]}"
