"""Fixtures that several files use."""

import logging

import pytest
import torch

from tensormask.engine.seeding import preserved_random_states


@pytest.fixture
def nothing_left_behind():
    """Whoever trains in a test leaves threads, random states and the log as they were."""
    package = logging.getLogger("tensormask")
    level = package.level
    threads = torch.get_num_threads()
    # Tensors this small are slower on several threads, by far so on a busy machine.
    torch.set_num_threads(1)
    with preserved_random_states():
        yield
    torch.set_num_threads(threads)
    package.setLevel(level)
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
