"""Optimizer groups, schedules and clipping against detectron2's rules, by hand or by fvcore."""

import json
import math
from pathlib import Path

import pytest
import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensormask.config import get_cfg
from tensormask.engine.solver import (
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
    parameter_groups,
)
from tensormask.modeling.backbone import get_norm

DATA = Path(__file__).parents[1] / "assets"


def make_cfg(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    return cfg


def make_scheduler(cfg):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def run_schedule(cfg, count):
    """Return the learning rates of the first `count` iterations."""
    optimizer, scheduler = make_scheduler(cfg)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# ---- parameter groups ----


def settings_by_name(model, groups):
    """Return `{parameter's name: (lr, weight decay)}`; each parameter must be in one group only."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = [(names[p], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(placed) == len(dict(placed))
    return dict(placed)


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.tied = nn.Conv2d(3, 4, 1, bias=False)
        self.tied.weight = self.conv.weight


def test_groups_of_norms_and_the_rest():
    model = SmallNet()
    groups = parameter_groups(model, lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
    assert settings_by_name(model, groups) == {
        "conv.weight": (0.1, 1e-4),
        "conv.bias": (0.1, 1e-4),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
    }
    assert len(groups) == 2


def test_bias_rules_override_the_norm_rule():
    # As in detectron2, which applies the override by the name "bias" last.
    model = SmallNet()
    decays = {"weight_decay": 1e-4, "weight_decay_norm": 0.5, "weight_decay_bias": 0.25}
    groups = parameter_groups(model, lr=0.1, **decays, bias_lr_factor=2.0)
    assert settings_by_name(model, groups) == {
        "conv.weight": (0.1, 1e-4),
        "conv.bias": (0.2, 0.25),
        "norm.weight": (0.1, 0.5),
        "norm.bias": (0.2, 0.25),
    }


def test_norm_modules_are_recognized_by_type():
    kinds = (nn.BatchNorm1d, nn.LayerNorm, *map(get_norm, ("BN", "SyncBN", "GN", "LN")))
    norms = [kind(2) for kind in kinds]
    for norm in (*norms, nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True)):
        groups = parameter_groups(norm, lr=1.0, weight_decay=0.1, weight_decay_norm=0.0)
        assert [group["weight_decay"] for group in groups] == [0.0], norm


def test_sgd_step_by_hand():
    cfg = make_cfg(BASE_LR=0.1, MOMENTUM=0.5, WEIGHT_DECAY=0.01)
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(cfg, layer)
    for expected in (2 - 0.1 * 3.02, 1.698 - 0.1 * (0.5 * 3.02 + 3.01698)):
        layer.weight.grad = torch.full((1, 1), 3.0)
        optimizer.step()
        assert layer.weight.item() == pytest.approx(expected)


def test_adamw_and_nesterov_reach_the_optimizer():
    layer = nn.Linear(1, 1)
    assert type(build_optimizer(make_cfg(OPTIMIZER="AdamW"), layer)) is torch.optim.AdamW
    assert build_optimizer(make_cfg(NESTEROV=True), layer).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    "options",
    [
        *({"BASE_LR": value} for value in (-0.1, math.nan, math.inf)),
        *({key: -1e-4} for key in ("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS")),
        *({"MOMENTUM": -0.9}, {"BIAS_LR_FACTOR": -1.0}),
        {"NESTEROV": True, "MOMENTUM": 0.0},
    ],
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match=rf"^SOLVER\.{next(iter(options))} is "):
        build_optimizer(make_cfg(**options), nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_a_learning_rate_of_0(name):
    cfg = make_cfg(BASE_LR=0.0, LR_SCHEDULER_NAME=name)
    optimizer = build_optimizer(cfg, nn.Linear(2, 1))
    build_lr_scheduler(cfg, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="OPTIMIZER"):
        build_optimizer(make_cfg(OPTIMIZER="Adam"), nn.Linear(1, 1))


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="FREEZE_AT"):
        build_optimizer(get_cfg(), nn.Linear(1, 1).requires_grad_(False))


# ---- schedules ----


def test_detectron2_parity_case():
    case = json.loads((DATA / "lr_steps_r50_bipyramid.json").read_text())
    cfg = get_cfg()
    cfg.merge_from_list(case["opts"])
    assert run_schedule(cfg, len(case["lr"])) == pytest.approx(case["lr"], rel=1e-12)


def fvcore_factor(solver, iteration):
    """detectron2's schedule put together from fvcore's parts."""
    max_iter = solver["MAX_ITER"]
    if solver["LR_SCHEDULER_NAME"] == "WarmupCosineLR":
        base = CosineParamScheduler(1.0, solver["BASE_LR_END"] / solver["BASE_LR"])
    else:
        steps = [step for step in solver["STEPS"] if step < max_iter]
        values = [solver["GAMMA"] ** k for k in range(len(steps) + 1)]
        base = MultiStepParamScheduler(values, num_updates=max_iter, milestones=steps)
    length = min(solver["WARMUP_ITERS"] / max_iter, 1.0)
    start = solver["WARMUP_FACTOR"] * base(0.0)
    if solver["WARMUP_METHOD"] == "constant":
        warmup = ConstantParamScheduler(start)
    else:
        warmup = LinearParamScheduler(start, base(length))
    both = CompositeParamScheduler([warmup, base], [length, 1 - length], ["rescaled", "fixed"])
    return both(iteration / max_iter)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize(
    "max_iter, warmup_iters, steps",
    [
        (540_000, 1000, (480_000, 520_000)),
        (100, 30, (10, 60)),  # the warm-up ends after the first step
        (20, 0, (5,)),
        (20, 50, (5,)),  # warm-up only
        (7, 3, (2, 6, 9)),  # one step that is never reached
    ],
)
def test_schedule_equals_fvcore(name, method, max_iter, warmup_iters, steps):
    solver = {
        **{"LR_SCHEDULER_NAME": name, "MAX_ITER": max_iter, "STEPS": steps, "GAMMA": 0.1},
        **{"WARMUP_METHOD": method, "WARMUP_ITERS": warmup_iters, "WARMUP_FACTOR": 0.001},
        **{"BASE_LR": 0.02, "BASE_LR_END": 0.004},
    }
    _, scheduler = make_scheduler(make_cfg(**solver))
    edges = {0, warmup_iters, max_iter, *steps}
    iterations = {i + d for i in edges for d in (-1, 0, 1)} | set(range(0, max_iter, 997))
    for iteration in sorted(i for i in iterations if 0 <= i < max_iter):
        expected = fvcore_factor(solver, iteration)
        assert scheduler.lr_lambdas[0](iteration) == pytest.approx(expected, rel=1e-9), iteration


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
@pytest.mark.parametrize(
    "method, factor, warmup_iters, highest",
    [
        ("linear", 0.001, 19, None),
        ("constant", 0.001, 19, None),
        ("constant", 1.0, 50, None),
        ("constant", 0.001, 20, "2e-05"),
        ("linear", 0.5, 0, None),
        ("linear", 0.001, 20, "0.019"),
        ("linear", 0.001, 1000, "0.019"),
    ],
)
def test_a_warm_up_without_end_is_a_warning(caplog, name, method, factor, warmup_iters, highest):
    solver = {"WARMUP_METHOD": method, "WARMUP_FACTOR": factor, "WARMUP_ITERS": warmup_iters}
    make_scheduler(make_cfg(**solver, MAX_ITER=20, STEPS=(), BASE_LR=0.02, LR_SCHEDULER_NAME=name))
    messages = [m for m in caplog.messages if "WARMUP_ITERS" in m]
    assert len(messages) == (highest is not None)
    if messages and name == "WarmupMultiStepLR":
        assert f"at most {highest}, and never BASE_LR, 0.02." in messages[0]


def test_a_warm_up_by_its_share_of_the_run(caplog):
    """A quarter of 8 iterations; WARMUP_ITERS does not count."""
    caplog.set_level("INFO")
    solver = {"WARMUP_FACTOR": 0.0, "BASE_LR": 1.0, "STEPS": (), "WARMUP_ITERS": 6}
    assert run_schedule(make_cfg(**solver, WARMUP_SHARE=0.25, MAX_ITER=8), 4) == [0, 0.5, 1, 1]
    assert "WARMUP_SHARE 0.25: a warm-up of 2 iterations" in caplog.text
    # It always ends before the run does.
    assert run_schedule(make_cfg(**solver, WARMUP_SHARE=0.99, MAX_ITER=3), 3) == [0, 0.5, 1]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_cosine_by_hand():
    cfg = make_cfg(
        LR_SCHEDULER_NAME="WarmupCosineLR", MAX_ITER=4, WARMUP_ITERS=0, BASE_LR=1.0, BASE_LR_END=0.2
    )
    high, low = (0.2 + 0.4 * (1 + sign * math.sqrt(0.5)) for sign in (1, -1))
    assert run_schedule(cfg, 5) == pytest.approx([1.0, high, 0.6, low, 0.2])


def test_the_factor_of_each_group_is_kept():
    cfg = make_cfg(BASE_LR=1.0, BIAS_LR_FACTOR=2.0, MAX_ITER=9, STEPS=(4,), WARMUP_ITERS=0)
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    "solver, named",
    [
        ({"LR_SCHEDULER_NAME": "Step"}, "LR_SCHEDULER_NAME"),
        ({"WARMUP_METHOD": "slow"}, "WARMUP_METHOD"),
        ({"WARMUP_SHARE": 1.0}, "WARMUP_SHARE"),
        ({"WARMUP_SHARE": -0.1}, "WARMUP_SHARE"),
        ({"STEPS": (20, 10)}, "STEPS"),
        ({"STEPS": (0, 10)}, "STEPS"),
        ({"MAX_ITER": 0}, "MAX_ITER"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 1.0}, "BASE_LR_END"),
    ],
)
def test_schedule_mistakes_are_named(solver, named):
    with pytest.raises(ValueError, match=named):
        make_scheduler(make_cfg(**solver))


# ---- gradient clipping ----


def clip(clip_type, limit, *, enabled=True, norm_type=2.0):
    """Return the gradients (3, 4) and (-6, 8) after clipping, and the returned norm."""
    cfg = get_cfg()
    options = cfg.SOLVER.CLIP_GRADIENTS
    options.ENABLED, options.CLIP_TYPE = enabled, clip_type
    options.CLIP_VALUE, options.NORM_TYPE = limit, norm_type
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = torch.tensor([-6.0, 8.0])  # the third has none
    norm = build_gradient_clipper(cfg)(parameters)
    return [p.grad.tolist() for p in parameters[:2]], norm.item()


@pytest.mark.parametrize(
    "clip_type, limit, norm_type, expected",
    [
        ("value", 5.0, 2.0, [[3, 4], [-5, 5]]),
        ("norm", 5.0, 2.0, [[3, 4], [-3, 4]]),
        ("norm", 4.0, math.inf, [[3, 4], [-3, 4]]),
        ("full_model", math.sqrt(125) / 2, 2.0, [[1.5, 2], [-3, 4]]),
        ("full_model", 4.0, math.inf, [[1.5, 2], [-3, 4]]),
        ("full_model", 100.0, 2.0, [[3, 4], [-6, 8]]),
    ],
)
def test_clipping_by_hand(clip_type, limit, norm_type, expected):
    gradients, norm = clip(clip_type, limit, norm_type=norm_type)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient == pytest.approx(wanted, rel=1e-5)
    assert norm == pytest.approx(math.sqrt(125))


class CountNorms(TorchDispatchMode):
    """Count the gradients whose norm is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_foreach_norm" in str(func):
            self.count += len(args[0])
        return func(*args, **kwargs or {})


def test_full_model_clipping_computes_the_norm_once():
    with CountNorms() as norms:
        gradients, norm = clip("full_model", math.sqrt(125) / 2)
    assert norms.count == len(gradients)
    assert norm == pytest.approx(math.sqrt(125))


def test_clipping_off_only_returns_the_norm():
    assert clip("value", 1.0, enabled=False) == ([[3, 4], [-6, 8]], pytest.approx(math.sqrt(125)))


def test_unknown_clip_type():
    with pytest.raises(ValueError, match="CLIP_TYPE"):
        clip("sometimes", 1.0)
