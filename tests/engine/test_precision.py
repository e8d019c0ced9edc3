"""Options of speed and precision: their checks, and their path from the config."""

from copy import deepcopy

import pytest
import tiny
import torch

from tensormask.config import get_cfg
from tensormask.engine import trainer
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.modeling.build import compile_dense_parts
from tensormask.utils.random import set_determinism

CPU = torch.device("cpu")
BOX = [[4.0, 4.0, 40.0, 40.0]]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def losses_of(model, size=64):
    losses = model([tiny.make_image(size, size)], [tiny.target(size, size, BOX)])
    return {name: loss.item() for name, loss in losses.items()}


def test_an_unknown_dtype():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.DTYPE", "half"])
    with pytest.raises(ValueError, match=r"AMP\.DTYPE.*'half'"):
        build_autocast(cfg, CPU)


def test_a_gpu_without_bfloat16(monkeypatch):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.AMP.ENABLED", True])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="this GPU does not support: set it to 'float16'"):
        build_autocast(cfg, torch.device("cuda"))
    build_autocast(cfg, CPU)


@pytest.mark.parametrize(
    "precision, matmul, convolutions",
    [
        ("", "highest", True),
        ("highest", "highest", False),
        ("high", "high", True),
        ("medium", "medium", True),
    ],
)
def test_float32_precision(precision, matmul, convolutions):
    try:
        set_float32_precision(precision)
        assert torch.get_float32_matmul_precision() == matmul
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
        losses_of(tiny.build("bipyramid"))  # the CPU has deterministic algorithms for all of it
        set_determinism(deterministic=False, benchmark=True)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        set_determinism(deterministic=False, benchmark=False)
    with pytest.raises(ValueError, match="DETERMINISTIC and CUDNN_BENCHMARK are both on"):
        set_determinism(deterministic=True, benchmark=True)


class Counter:
    """A compiler backend that runs the graphs unchanged and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_padding_limits_the_number_of_compilations():
    options = ("bipyramid", ["MODEL.SIZE_DIVISOR", 128])
    model, plain, backend = tiny.build(*options), tiny.build(*options), Counter()
    names = list(model.state_dict())
    compile_dense_parts(model, "default", backend)
    assert list(model.state_dict()) == names
    assert losses_of(model, 100) == pytest.approx(losses_of(plain, 100), rel=1e-5)
    num_graphs = backend.graphs
    assert num_graphs >= 3  # backbone, pyramid, head
    losses_of(model, 128)  # padded to the same size
    assert backend.graphs == num_graphs
    losses_of(model, 130)
    assert backend.graphs > num_graphs
    copy = deepcopy(model)  # as for averages of weights: not compiled
    num_graphs = backend.graphs
    losses_of(copy, 260)
    assert backend.graphs == num_graphs


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
