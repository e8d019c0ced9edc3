"""Starts a command once for each process of a run, with what `distributed.start` needs to know.

The work is done by the agent behind `torchrun`: it watches the processes, stops all when one dies,
and hands signals on.
"""

import re
import signal
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from tensormask.modeling.build import resolve_device
from tensormask.utils.errors import UserError

AUTO = "auto"


def check_launch(
    *, device: str, num_processes: int, num_machines: int, machine_rank: int, dist_url: str
) -> None:
    """Find what is wrong with the numbers that `launch` takes.

    Args:
        device: `MODEL.DEVICE`.
        num_processes: on each machine, each with its own GPU unless `device` is the CPU.
        num_machines: that take part.
        machine_rank: which of them this is, from 0.
        dist_url: `tcp://host:port` of machine 0, or for one machine "auto", a free port.

    Raises:
        ValueError: one of them is no such number or address, or there are not enough GPUs.
    """
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-machines is {num_machines} and --machine-rank {machine_rank}: the machines are "
            f"numbered from 0 to {max(0, num_machines - 1)}"
        )
    if dist_url == AUTO and num_machines > 1:
        raise UserError(
            "--dist-url auto is for one machine: give all of them the address of machine 0 and a "
            "port that is free there, such as --dist-url tcp://10.0.0.1:29500"
        )
    if dist_url != AUTO:
        _endpoint(dist_url)
    num_gpus = torch.cuda.device_count()
    on_cpu = resolve_device(device).type == "cpu"
    if num_processes > 1 and (device == AUTO if on_cpu else num_processes > num_gpus):
        raise UserError(
            f"--num-gpus is {num_processes}, but this machine has {num_gpus} that can be used; "
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

    The numbers are those of `check_launch`.

    Returns:
        0 if all processes gave it, the exit code of the first that did not (1 if a signal ended
        it), or 128 and the number of the signal that ended the wait.

    Raises:
        ValueError: the machines, or the processes, do not find each other by `dist_url`.
    """
    if dist_url == AUTO:
        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    else:
        rendezvous = {"rdzv_backend": "static", "rdzv_endpoint": _endpoint(dist_url)}
        rendezvous["rdzv_configs"] = {"rank": machine_rank}
    config = LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id="tensormask",  # the same on all machines; each run has a store of its own
        **rendezvous,
        local_addr="localhost" if num_machines == 1 else None,
        max_restarts=0,
    )
    try:
        launch_agent(config, command[0], list(command[1:]))
    except dist.DistError as error:
        raise UserError(
            f"the processes cannot meet by --dist-url {dist_url}: {error}. Give the address of "
            "machine 0, and a port that is free there and open to all machines"
        ) from error
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
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


def _endpoint(dist_url: str) -> str:
    """`host:port` of an address."""
    found = re.fullmatch(r"tcp://([^/:\s]+|\[[0-9a-fA-F:]+\]):([1-9][0-9]{0,4})/?", dist_url)
    if not found or int(found[2]) > 65535:
        raise UserError(f"--dist-url is {dist_url!r}: write auto, or tcp://host:port")
    return f"{found[1]}:{found[2]}"
