"""One step: by hand, in parts, in half precision, with averages, and with NaN or infinity."""

import pytest
import tiny
import torch
from torch import nn

from tensormask.config import get_cfg
from tensormask.engine.anomaly import NonFiniteError
from tensormask.engine.precision import build_autocast
from tensormask.engine.solver import build_ema, build_gradient_clipper, update_averages
from tensormask.engine.step import TrainState, train_step

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Product(nn.Module):
    """loss = w x, with w = 2 at the start."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=dtype))

    def forward(self, images, targets):
        return {"loss": (self.weight * torch.stack(images)).mean()}


def state_of(model, lr=0.5, scaler=None, ema=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.1**i)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, optimizer, scheduler, scaler, ema)


def samples(*values):
    images = [torch.tensor(value) for value in values]
    return [{"image": x, "target": {}, "file_name": f"{x}.png"} for x in images]


def step(state, batch, **options):
    options = {"iteration": 0, "clip_gradients": build_gradient_clipper(get_cfg()), **options}
    return train_step(state, batch, **options)


def test_one_step_by_hand():
    # w = 2, x = 3: loss 6, gradient 3; lr 0.5.
    state = state_of(Product())
    state.model.weight.grad = torch.full((1,), 100.0)  # of an earlier step
    metrics = step(state, samples(3.0))
    times = {"forward_time", "backward_time", "optimizer_time"}
    assert all(metrics.pop(name) > 0 for name in times)
    assert metrics == {"total_loss": 6.0, "loss": 6.0, "lr": 0.5, "grad_norm": 3.0}
    assert state.model.weight.item() == 0.5
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_parts_are_averaged():
    # Gradients 1, 2, 6: their mean is 3, and losses 2, 4, 12 have the mean 6.
    state = state_of(Product())
    metrics = step(state, samples(1.0, 2.0, 6.0), accumulate_steps=3)
    assert (metrics["loss"], metrics["grad_norm"]) == (6.0, 3.0)
    assert state.model.weight.item() == 0.5


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"3 images.*accumulate_steps = 2 equal parts"):
        step(state_of(Product()), samples(1.0, 2.0, 6.0), accumulate_steps=2)


def sample(size, boxes, seed=0):
    image, target = tiny.make_image(size, size, seed), tiny.target(size, size, boxes)
    return {"image": image, "target": target, "file_name": ""}


def gradients(batch, accumulate_steps=1):
    model = tiny.build("natural")
    step(state_of(model, lr=0.0), batch, accumulate_steps=accumulate_steps)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found, expected):
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=1e-4, msg=name)


def test_parts_with_equal_numbers_of_positive_windows_equal_the_batch():
    batch = [sample(64, [[4.0, 4.0, 40.0, 40.0]]), sample(64, [[20.0, 20.0, 56.0, 56.0]], seed=1)]
    assert_close(gradients(batch, accumulate_steps=2), gradients(batch))


def test_parts_with_different_numbers_of_positive_windows_have_equal_weight():
    one, two = [[4.0, 4.0, 40.0, 40.0]], [[20.0, 20.0, 56.0, 56.0], [0.0, 30.0, 36.0, 64.0]]
    batch = [sample(64, one), sample(64, two, seed=1)]
    first, second = (gradients([each]) for each in batch)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert_close(gradients(batch, accumulate_steps=2), mean)
    with pytest.raises(AssertionError):  # in the undivided batch, windows have equal weight
        assert_close(gradients(batch), mean)


def amp_cfg(dtype, enabled=True):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.DTYPE", dtype])
    return cfg


def test_bfloat16_in_forward_pass_and_losses_only():
    autocast, scaler = build_autocast(amp_cfg("bfloat16"), CPU)
    assert not scaler.is_enabled()
    model, exact = tiny.build("bipyramid"), tiny.build("bipyramid")
    seen = {}
    model.fpn.register_forward_hook(lambda module, args, out: seen.update(dtype=out[0].dtype))
    # Not 64 px: in bfloat16 PyTorch 2.14's CPU convolution of stride 2 on a single pixel, which p6
    # would be, has uninitialized memory for a gradient.
    batch = [sample(128, [[4.0, 4.0, 40.0, 40.0]])]
    expected = step(state_of(exact, lr=0.0), batch)
    metrics = step(state_of(model, lr=0.0), batch, autocast=autocast)
    assert seen["dtype"] == torch.bfloat16
    assert metrics["loss_cls"] == pytest.approx(expected["loss_cls"], rel=0.02)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert "loss_scale" not in metrics
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_float16_scales_the_loss_and_unscales_the_gradient():
    assert build_autocast(amp_cfg("float16"), CPU)[1].is_enabled()
    state = state_of(Product(), scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    scaled = []
    state.model.weight.register_hook(lambda gradient: scaled.append(gradient.item()))
    metrics = step(state, samples(3.0))
    assert scaled == [3.0 * 64]
    assert (metrics["grad_norm"], metrics["loss_scale"]) == (3.0, 64.0)
    assert state.model.weight.item() == 0.5


def test_a_loss_scale_that_is_too_large_skips_the_step_and_is_halved():
    _, scaler = build_autocast(amp_cfg("float16"), CPU)
    state = state_of(Product(), scaler=scaler)
    scaler.scale(torch.ones(()))  # initializes the scale, 65536
    huge = samples(3e34)  # overflows float32 when multiplied by 65536
    metrics = step(state, huge)
    assert state.model.weight.item() == 2.0
    assert not metrics["grad_norm"] < float("inf")
    assert metrics["loss_scale"] == 32768


def test_a_gradient_that_is_not_finite_at_any_scale_stops():
    _, scaler = build_autocast(amp_cfg("float16"), CPU)
    state = state_of(Product(), scaler=scaler)
    state.model.weight.register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(16):  # 65536 is halved to 1
        step(state, samples(3.0))
    with pytest.raises(NonFiniteError, match=r"iteration 5, for weight.*3\.0\.png"):
        step(state, samples(3.0), iteration=5)
    assert scaler.get_scale() == 1.0
    assert state.model.weight.item() == 2.0


def test_a_gradient_that_is_not_finite_does_not_change_the_weights():
    state = state_of(Product())
    state.model.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NonFiniteError, match=r"Gradient.*iteration 0, for weight"):
        step(state, samples(3.0))
    assert state.model.weight.item() == 2.0


def test_a_loss_that_is_not_finite_does_not_change_the_weights():
    state = state_of(Product())
    with pytest.raises(NonFiniteError, match=r"Loss.*iteration 0: loss inf.*inf\.png"):
        step(state, samples(1.0, float("inf")), accumulate_steps=2)
    assert state.model.weight.item() == 2.0


def test_flags_that_any_rank_has_set_are_read_with_the_losses(monkeypatch):
    of_other_rank = torch.tensor([4.0, 0.0, 1.0, 0.0])  # its loss, and its flags
    monkeypatch.setattr("tensormask.engine.step.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "tensormask.engine.step.mean_over_ranks", lambda own: (own + of_other_rank) / 2
    )
    flags = {"own": True, "other's": False, "none's": False}
    metrics = step(state_of(Product()), samples(3.0), flags=flags)
    assert flags == {"own": True, "other's": True, "none's": False}
    assert metrics["loss"] == 5.0


@pytest.mark.parametrize(
    "decay, warmup, decays",
    [
        (0.75, False, (0.75, 0.75, 0.75)),
        (0.24, True, (2 / 11, 0.24, 0.24)),  # 3 / 12 is above it
        (0.9998, True, (2 / 11, 3 / 12, 4 / 13)),
    ],
)
def test_averages_follow_their_formula(decay, warmup, decays):
    cfg = get_cfg()
    cfg.SOLVER.EMA.update({"ENABLED": True, "DECAY": decay, "WARMUP": warmup})
    model = Product()
    state = state_of(model, ema=build_ema(cfg, model))
    weights = []
    for _ in range(4):
        step(state, samples(1.0))
        weights.append(model.weight.item())
    expected = weights[0]
    for factor, weight in zip(decays, weights[1:], strict=True):
        expected = factor * expected + (1 - factor) * weight
    assert state.ema.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert expected != weights[-1]


def test_averages_include_batch_norm_and_are_not_trained():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5])
    model = nn.BatchNorm1d(2)
    ema, same = build_ema(cfg, model), build_ema(cfg, model)
    for number, mean in enumerate((2.0, 4.0), start=1):
        model.running_mean.fill_(mean)
        model.num_batches_tracked.fill_(number)
        update_averages(ema, model)
        same.update_parameters(model)  # as torch does it
    for name, value in same.state_dict().items():
        assert torch.equal(value, ema.state_dict()[name]), name
    assert ema.module.running_mean.tolist() == [3.0, 3.0]
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    for decay in (-0.1, 1.0):
        cfg.SOLVER.EMA.DECAY = decay
        with pytest.raises(ValueError, match=r"SOLVER\.EMA\.DECAY"):
            build_ema(cfg, model)


def test_half_precision_and_averages_are_off_by_default():
    autocast, scaler = build_autocast(get_cfg(), CPU)
    assert not scaler.is_enabled()
    assert build_ema(get_cfg(), Product()) is None
    with autocast():
        assert not torch.is_autocast_enabled("cpu")
