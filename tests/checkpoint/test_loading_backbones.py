"""ImageNet ResNets of detectron2, MSRA and torchvision: names, features, and matching images."""

import copy
import logging
import pickle
import re
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from foreign import torch_bytes
from tiny import build
from torchvision.models import resnet

from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.checkpoint.names import find_kind, to_our_names

TORCHVISION = [
    *("INPUT.FORMAT", "RGB", "MODEL.RESNETS.STRIDE_IN_1X1", False),
    *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
]
MSRA = [
    *("INPUT.FORMAT", "BGR", "MODEL.RESNETS.STRIDE_IN_1X1", True),
    *("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
]


def build_resnet(depth: int, *opts: object, norm: str = "FrozenBN"):
    return build(
        "natural", ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm, *opts]
    ).eval()


@cache
def seeded_resnet(depth: int) -> resnet.ResNet:
    """Return torchvision's own, with norms that all change their input."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, f"resnet{depth}")().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.3)
            module.num_batches_tracked.fill_(3)
    return model


def assert_same_features(ours, theirs: resnet.ResNet) -> None:
    x = torch.randn(1, 3, 64, 64)
    stages = (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    with torch.inference_mode():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for found, stage in zip(ours.backbone(x), stages, strict=True):
            expected = stage(expected)
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def caffe2_blobs(model: resnet.ResNet, spelling: str) -> dict[str, torch.Tensor]:
    """Return the weights by MSRA's names. `spelling` of the norms: "s", "gamma" or "rm"."""
    blobs = {"conv1_w": model.conv1.weight}

    def add_norm(name: str, norm: torch.nn.BatchNorm2d) -> None:
        if spelling == "gamma":
            blobs[f"{name}_gamma"], blobs[f"{name}_beta"] = norm.weight, norm.bias
            blobs[f"{name}_running_mean"] = norm.running_mean
            blobs[f"{name}_running_var"] = norm.running_var
        elif spelling == "rm":
            blobs[f"{name}_s"], blobs[f"{name}_b"] = norm.weight, norm.bias
            blobs[f"{name}_rm"], blobs[f"{name}_riv"] = norm.running_mean, norm.running_var
        else:  # mean and variance are part of scale and shift
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            blobs[f"{name}_s"] = scale * (1 + norm.eps) ** 0.5
            blobs[f"{name}_b"] = norm.bias - norm.running_mean * scale

    add_norm("res_conv1_bn", model.bn1)
    for stage in range(1, 5):
        for i, block in enumerate(getattr(model, f"layer{stage}")):
            prefix = f"res{stage + 1}_{i}"
            for number, letter in ((1, "a"), (2, "b"), (3, "c")):
                if conv := getattr(block, f"conv{number}", None):
                    blobs[f"{prefix}_branch2{letter}_w"] = conv.weight
                    add_norm(f"{prefix}_branch2{letter}_bn", getattr(block, f"bn{number}"))
            if block.downsample is not None:
                blobs[f"{prefix}_branch1_w"] = block.downsample[0].weight
                add_norm(f"{prefix}_branch1_bn", block.downsample[1])
    return {name: value.detach() for name, value in blobs.items()}


SOLVER = {
    **{"fc1000_w": np.ones((10, 8)), "fc1000_b": np.ones(10), "pred_w": np.ones((10, 8))},
    **{"conv1_w_momentum": np.ones((64, 3, 7, 7)), "lr": 0.1, "weight_order": ["conv1_w"]},
}


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision(tmp_path, caplog, depth: int) -> None:
    theirs, model = seeded_resnet(depth), build_resnet(depth, *TORCHVISION)
    path = tmp_path / "resnet.pth"
    path.write_bytes(torch_bytes(theirs.state_dict(), legacy=depth == 50))
    with caplog.at_level(logging.INFO):
        result = load_weights(model, path)
    assert [message for message in caplog.messages if "loaded" not in message] == [
        f"{path}: entries that are not used: fc.weight, fc.bias",
        f"{path}: backbone only: fpn and heads keep their initial weights",
    ]
    assert result.unexpected == result.misshapen == []
    assert result.missing == [n for n in model.state_dict() if not n.startswith("backbone.")]
    with pytest.raises(ValueError, match="missing"):
        check_complete(result, path)
    assert_same_features(model, theirs)


@pytest.mark.parametrize(
    "depth, spelling, inside", [(18, "gamma", None), (18, "rm", "model"), (50, "s", "blobs")]
)
def test_msra(tmp_path, caplog, depth: int, spelling: str, inside: str | None) -> None:
    """Its strides are in the 1x1 convolutions; torchvision's trunk with that is the same."""
    theirs, model = copy.deepcopy(seeded_resnet(depth)), build_resnet(depth, *MSRA)
    blobs = {name: blob.numpy() for name, blob in caffe2_blobs(theirs, spelling).items()} | SOLVER
    path = tmp_path / f"R-{depth}.pkl"
    path.write_bytes(pickle.dumps({inside: blobs} if inside else blobs, 2))
    with caplog.at_level(logging.INFO):
        result = load_weights(model, path)
    unused, _, backbone = caplog.messages
    assert unused == f"{path}: entries that are not used: {', '.join(SOLVER)}"
    assert backbone == f"{path}: backbone only: fpn and heads keep their initial weights"
    assert result.unexpected == result.misshapen == []
    for module in theirs.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    assert_same_features(model, theirs)


def as_detectron2s_backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename torchvision's names as detectron2's own script does."""
    renamed = {}
    for name, value in state.items():
        name = name if "layer" in name else f"stem.{name}"
        for stage in (1, 2, 3, 4):
            name = name.replace(f"layer{stage}", f"res{stage + 1}")
        for number in (1, 2, 3):
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = value
    return renamed


def test_a_backbone_with_detectron2s_names(tmp_path) -> None:
    theirs = seeded_resnet(18)
    path = tmp_path / "R-18.pkl"
    weights = as_detectron2s_backbone(theirs.state_dict())
    content = {"model": {name: value.numpy() for name, value in weights.items()}}
    content |= {"__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    other, ours = build_resnet(18, *MSRA), build_resnet(18, *TORCHVISION)
    with pytest.raises(ValueError, match=r"torchvision's ImageNet weights.*add INPUT\.FORMAT RGB"):
        load_weights(other, path)
    assert load_weights(ours, path).unexpected == []
    assert_same_features(ours, theirs)
    # The author of the weights is unknown unless the file names it.
    path.write_bytes(pickle.dumps(content | {"__author__": "someone"}))
    assert load_weights(other, path).unexpected == []
    for name, value in other.backbone.state_dict().items():
        assert torch.equal(value, ours.backbone.state_dict()[name]), name


@pytest.mark.parametrize("names", ["torchvision", "Caffe2", "detectron2's backbone"])
@pytest.mark.parametrize("depth", [34, 101])
def test_names_of_deep_resnets(depth: int, names: str) -> None:
    """Every entry gets the name and shape of another parameter; without numbers."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        model = build_resnet(depth, *MSRA, "MODEL.DEVICE", "meta")
    state = theirs.state_dict()
    if names == "Caffe2":
        state = caffe2_blobs(theirs, "gamma")
        assert ("res4_22_branch2c_bn_gamma" if depth == 101 else "res4_5_branch2b_w") in state
    elif names != "torchvision":
        state = as_detectron2s_backbone(state)
    assert find_kind(state) == names
    ours, unused = to_our_names(state, names, [])
    assert all(name.split(".")[-2] in ("fc", "num_batches_tracked") for name in unused)
    own = {n: v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    counted = ".num_batches_tracked"
    renamed = {ours[n]: state[n].shape for n in ours if not ours[n].endswith(counted)}
    assert renamed == {n: v.shape for n, v in own.items() if not n.endswith(counted)}
    assert len(set(ours.values())) == len(ours)
    # The index of a block stays the same.
    for name, renamed_to in ours.items():
        assert re.findall(r"(?<=[._])\d+(?=[._]\w*(?:conv|bn|down|short|branch))", name) == (
            re.findall(r"(?<=\.)\d+(?=\.(?:conv|bn|down))", renamed_to)
        )


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_every_batch_norm_takes_them(tmp_path, norm: str) -> None:
    theirs = seeded_resnet(18)
    path = tmp_path / "resnet.safetensors"
    path.write_bytes(safetensors.torch.save(theirs.state_dict()))
    model = build_resnet(18, *TORCHVISION, norm=norm)
    assert load_weights(model, path).unexpected == []
    assert torch.equal(model.backbone.res5[1].bn2.running_var, theirs.layer4[1].bn2.running_var)
    assert model.backbone.res5[1].bn2.num_batches_tracked == 3


# ---- what is refused ----


RGB_MEAN, BGR_MEAN = "[123.675,116.28,103.53]", "[103.53,116.28,123.675]"
STD, STRIDE = "[58.395,57.12,57.375]", "MODEL.RESNETS.STRIDE_IN_1X1"
IMAGES = f'MODEL.PIXEL_MEAN "{RGB_MEAN}" MODEL.PIXEL_STD "{STD}"'


@pytest.mark.parametrize(
    "author, opts, overrides",
    [
        ("torchvision", ["INPUT.FORMAT", "BGR"], "INPUT.FORMAT RGB"),
        ("torchvision", ["MODEL.PIXEL_MEAN", BGR_MEAN], f'MODEL.PIXEL_MEAN "{RGB_MEAN}"'),
        ("torchvision", ["MODEL.PIXEL_STD", "[57.375,57.12,58.395]"], f'MODEL.PIXEL_STD "{STD}"'),
        ("torchvision", [STRIDE, True], f"{STRIDE} False"),
        ("torchvision", MSRA, f"INPUT.FORMAT RGB {IMAGES} {STRIDE} False"),
        ("MSRA", ["INPUT.FORMAT", "RGB"], "INPUT.FORMAT BGR"),
        ("MSRA", ["MODEL.PIXEL_STD", STD], 'MODEL.PIXEL_STD "[1.0,1.0,1.0]"'),
        ("MSRA", [STRIDE, False], f"{STRIDE} True"),
        ("MSRA", ["MODEL.PIXEL_MEAN", RGB_MEAN], f'MODEL.PIXEL_MEAN "{BGR_MEAN}"'),
    ],
)
def test_other_images_are_refused(tmp_path, author: str, opts: list, overrides: str) -> None:
    path = tmp_path / "resnet"
    if author == "MSRA":
        path.write_bytes(pickle.dumps({"conv1_w": np.zeros((64, 3, 7, 7))}))
    else:
        path.write_bytes(torch_bytes({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}))
    given = MSRA if author == "MSRA" else TORCHVISION
    model = build_resnet(50 if "STRIDE" in overrides else 18, *given, *opts)
    with pytest.raises(ValueError, match=rf"{author}'s .*: add {re.escape(overrides)}$"):
        load_weights(model, path)


def test_the_stride_of_small_resnets_is_ignored(tmp_path) -> None:
    path = tmp_path / "resnet.pth"
    path.write_bytes(torch_bytes(seeded_resnet(18).state_dict()))
    model = build_resnet(18, *TORCHVISION, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    assert load_weights(model, path).unexpected == []


def test_a_whole_model_takes_any_images(tmp_path) -> None:
    trained, model = (build_resnet(18, "INPUT.FORMAT", form) for form in ("RGB", "BGR"))
    path = tmp_path / "model.pth"
    path.write_bytes(torch_bytes({"model": trained.state_dict()}))
    assert not any(load_weights(model, path))


@pytest.mark.parametrize(
    "file_depth, depth, norm, part",
    [
        (18, 34, "FrozenBN", "backbone.res2.2.conv1.weight"),  # missing in the file
        (34, 18, "BN", "backbone.res2.2.conv1.weight"),  # missing in the model
        (18, 50, "FrozenBN", "backbone.res2.0.conv3.weight"),  # missing, and other shapes
        (18, 18, "GN", "backbone.stem.bn1.running_mean"),  # norms of another kind
    ],
)
def test_another_backbone_is_refused(tmp_path, file_depth, depth, norm, part) -> None:
    path = tmp_path / "resnet.pth"
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{file_depth}")().state_dict()
    zero = torch.zeros(())  # the file has one number
    path.write_bytes(torch_bytes({name: zero.expand(v.shape) for name, v in state.items()}))
    model = build_resnet(depth, *TORCHVISION, norm=norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"not the model's.*{part}.*RESNETS\.DEPTH"):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
