"""The files of TensorMask v2: each builds a model, and the light one trains."""

import pytest
import tiny
import torch

from tensormask import build_model
from tensormask.checkpoint.zoo import MODELS
from tensormask.config import config_names, get_cfg
from tensormask.engine.solver import build_lr_scheduler, build_optimizer
from tensormask.layers.norm import LayerNorm2d

NAMES = [name for name in config_names() if "v2" in name]


def load(name):
    cfg = get_cfg()
    cfg.merge_from_file(name)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_the_names():
    assert {"tensormask_v2_R_50_FPN_3x", "tensormask_v2_R_101_FPN_3x"} < {*NAMES}
    assert {"tensormask_v2_light", "Base-TensorMask-v2"} < {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_builds_a_model_whose_norms_have_no_weight_decay(name):
    cfg = load(name)
    assert cfg.MODEL.WEIGHTS in {"", *MODELS}
    cfg.MODEL.DEVICE = "meta"  # without random weights, which take time
    with torch.device("meta"):
        model = build_model(cfg)
    assert any(isinstance(module, LayerNorm2d) for module in model.head.modules())
    optimizer = build_optimizer(cfg, model)
    build_lr_scheduler(cfg, optimizer)
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = {n: decays[p] for n, p in model.named_parameters() if p.dim() == 1 and p in decays}
    assert not any(decay for name, decay in norms.items() if name.endswith("weight"))


def test_the_light_model_trains_and_detects():
    model = build_model(load("tensormask_v2_light"))
    image = tiny.make_image(64, 96)
    losses = model([image], [tiny.target(64, 96, [[10, 10, 50, 50]])])
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_dice"} <= losses.keys()
    sum(losses.values()).backward()
    (found,) = model.eval()([image])
    assert found["masks"].shape[1:] == (64, 96)
