"""Run functions in forked processes, which start at once: nothing is imported again."""

import multiprocessing
import os
import socket
import sys

CONTEXT = multiprocessing.get_context("fork")


def run_in_ranks(function, world_size=2):
    """Call a function in the processes of a launch; return their exit codes, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank):
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        }
        sys.exit(function())

    processes = [CONTEXT.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
