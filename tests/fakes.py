"""A model and a loader of known behavior, for tests of the loop; the fixture is in conftest.py.

The weights depend on the order of images, on dropout and on running statistics.
"""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tensormask.config import get_cfg
from tensormask.engine import trainer
from tensormask.engine.resume import load_checkpoint


class FakeModel(nn.Module):
    windows = SimpleNamespace(mask_sizes=())  # as `load_weights` needs

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.out = nn.Linear(8, 1)

    def forward(self, images, targets):
        x = self.out(self.layers(torch.stack(images)))[:, 0]
        y = torch.stack([target["value"] for target in targets])
        return {"loss_cls": (x - y).square().mean(), "loss_mask": x.abs().mean()}


def fake_loader(cfg, start_iteration):
    for iteration in itertools.count(start_iteration):
        generator = torch.Generator().manual_seed(cfg.SEED * 1000 + iteration)
        images = torch.rand(cfg.SOLVER.IMS_PER_BATCH, 4, generator=generator)
        names = [f"{iteration}_{k}.png" for k in range(len(images))]
        yield [
            {"image": x, "target": {"value": x.sum()}, "file_name": name, "issues": []}
            for x, name in zip(images, names, strict=True)
        ]


class Interrupted(Exception):
    pass


def make_cfg(folder, *overrides):
    cfg = get_cfg()
    cfg.merge_from_list([
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)"),
        *("SOLVER.MAX_ITER", 30, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 5),
        *("SOLVER.STEPS", "(20,)", "SOLVER.BASE_LR", 0.01, "SOLVER.CHECKPOINT_PERIOD", 10),
        *("MODEL.TENSOR_MASK.NUM_CLASSES", 2, "MODEL.MASK_ON", True, "SEED", 5, *overrides),
    ])  # fmt: skip
    return cfg


def weights(folder, name="model_final.pth"):
    return load_checkpoint(folder / name)["model"]


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def interrupted_run(cfg, monkeypatch, iteration, **options):
    """Train until an exception before this iteration."""
    real = trainer.train_step

    def step(state, batch, **options):
        if options["iteration"] == iteration:
            raise Interrupted
        return real(state, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(Interrupted):
            trainer.train(cfg, **options)
