"""Options of speed and precision: their checks, and their path from the config."""

import pytest
import tiny
import torch

from tensormask.config import get_cfg
from tensormask.engine import trainer
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.utils.random import set_determinism

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_an_unknown_dtype():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.DTYPE", "half"])
    with pytest.raises(ValueError, match=r"AMP\.DTYPE.*'half'"):
        build_autocast(cfg, CPU)


def test_a_gpu_without_bfloat16(monkeypatch):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.AMP.ENABLED", True])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="not supported by this GPU: set it to 'float16'"):
        build_autocast(cfg, torch.device("cuda"))
    build_autocast(cfg, CPU)


@pytest.mark.parametrize(
    "precision, convolutions", [("", True), ("highest", False), ("high", True), ("medium", True)]
)
def test_float32_precision(precision, convolutions):
    try:
        set_float32_precision(precision)
        assert torch.get_float32_matmul_precision() == (precision or "highest")
        assert torch.backends.cudnn.allow_tf32 is convolutions
    finally:
        set_float32_precision("")
    with pytest.raises(ValueError, match="FLOAT32_PRECISION is 'tf32'"):
        set_float32_precision("tf32")


def test_determinism():
    try:
        set_determinism(deterministic=True, benchmark=False)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        # The CPU has deterministic algorithms for the whole model.
        losses = tiny.build()([tiny.make_image(64, 64)], [tiny.target(64, 64, [[4, 4, 40, 40]])])
        sum(losses.values()).backward()
        set_determinism(deterministic=False, benchmark=True)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        set_determinism(deterministic=False, benchmark=False)
    with pytest.raises(ValueError, match="DETERMINISTIC and CUDNN_BENCHMARK are both on"):
        set_determinism(deterministic=True, benchmark=True)


def state_of(*opts):
    return trainer.build_state(tiny.get_cfg("natural", opts))


def test_each_key_reaches_the_state():
    assert state_of("SOLVER.AMP.ENABLED", True).scaler.is_enabled()
    assert state_of("SOLVER.EMA.ENABLED", True).ema is not None
    conv = state_of("MODEL.CHANNELS_LAST", True).model.backbone.res2[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert state_of("SOLVER.DETECT_ANOMALY", True).model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"set MODEL\.COMPILE to ''"):
        state_of("MODEL.COMPILE", "default", "SOLVER.DETECT_ANOMALY", True)
    plain = state_of()
    assert plain.ema is None
    assert not plain.scaler.is_enabled()
    assert not plain.model._forward_pre_hooks
