"""Fixtures of several test files."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeModel, fake_loader

from tensormask.data.checks.issues import IssueLog
from tensormask.engine import evaluator, run, trainer
from tensormask.utils.random import preserved_random_states


@pytest.fixture(autouse=True)
def quiet_log():
    """Undo the log level that a training of an earlier test, or of a fixture, has set."""
    logging.getLogger("tensormask").setLevel(logging.NOTSET)


@pytest.fixture
def nothing_left_behind():
    """Restore the number of threads, random states and the log after a test that trains."""
    package = logging.getLogger("tensormask")
    level = package.level
    threads = torch.get_num_threads()
    # Tensors this small are slower with several threads, above all on a busy machine.
    torch.set_num_threads(1)
    with preserved_random_states():
        yield
    torch.set_num_threads(threads)
    package.setLevel(level)
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()


@pytest.fixture
def fakes(monkeypatch):
    """Replace model, data and evaluation by fakes; `evaluations` lists the evaluated folders.

    The first image of the iterations `broken_at` is reported as broken.
    """
    state = SimpleNamespace(evaluations=[], results={"segm": {"AP": 30.0}}, broken_at=())

    def load(cfg, start_iteration=0, **processes):
        for iteration, batch in enumerate(fake_loader(cfg, start_iteration), start_iteration):
            if iteration in state.broken_at:
                batch[0]["issues"] = [("a", "image_broken", iteration)]
            yield batch

    def fake_evaluate(model, loader, dataset, folder, **options):
        torch.rand(3)  # draws from the global generator, as an evaluation may
        state.evaluations.append(Path(folder))
        return state.results

    content = {"name": "fake", "class_names": ["star", "ring"], "category_ids": [1, 2]}
    content |= {"has_annotations": True, "num_annotations": 7, "image_ids": range(7)}
    content["image_size"] = lambda self, image_id: (48, 64)
    content["issues"] = state.issues = IssueLog()
    dataset = type("FakeDataset", (list,), content)(range(7))
    for module in (trainer, evaluator):
        monkeypatch.setattr(module, "build_model", lambda cfg, **options: FakeModel())
    for module in (trainer, evaluator, run):
        monkeypatch.setattr(module, "get_dataset", lambda name: dataset)
    monkeypatch.setattr(trainer, "build_train_loader", load)
    monkeypatch.setattr(evaluator, "build_test_loader", lambda cfg, dataset, **processes: [])
    monkeypatch.setattr(evaluator, "evaluate", fake_evaluate)
    monkeypatch.setattr(evaluator, "check_files", lambda dataset, num_workers: [])
    monkeypatch.setattr(evaluator, "check_sets", lambda datasets, strict: None)
    return state
