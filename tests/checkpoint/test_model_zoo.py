"""The model zoo: its table and its document, and the files of names and URLs."""

import os
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import make_model_zoo
import pytest
import torch
from fuzz import fuzz_examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback import Answer, serve
from torchvision.models import get_weight

from tensormask.checkpoint import downloads
from tensormask.checkpoint.downloads import cache_folder, cache_path, resolve
from tensormask.commands import train
from tensormask.model_zoo import MODELS, PACKAGED, build, get_config

ROOT = Path(__file__).parents[2]
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
R_50_6X = f"{DETECTRON2_URL}TensorMask/tensormask_R_50_FPN_6x/153538791/model_final_e8df31.pkl"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORMASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def downloaded(monkeypatch):
    """The requested downloads, as (url, sha256), instead of making them."""
    asked = []
    monkeypatch.setattr(downloads, "download", lambda *args: asked.append(args) or Path("local"))
    return asked


# ---- the table and its document ----


def test_document_is_of_the_table():
    text = make_model_zoo.PATH.read_text(encoding="utf-8")
    assert text == make_model_zoo.render(), "run: python dev/make_model_zoo.py"
    for model in MODELS.values():
        assert f"| `{model.name}` |" in text
        assert model.url is None or f"({model.url})" in text


def test_the_row_of_the_packaged_model(monkeypatch):
    row = MODELS[PACKAGED]._replace(sha256="12ab", metrics={"mask AP": 1.25}, command="train ...")
    monkeypatch.setitem(MODELS, PACKAGED, row)
    text = make_model_zoo.render()
    assert f"| `{PACKAGED}` | cell nuclei | 1.2 | – | nuclei_dsb2018 val | 12ab |" in text
    assert "The training was `train ...`.\n" in text


def test_commands_of_the_document():
    text = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^tensormask (train|evaluate) (.+)$", text, re.MULTILINE)
    named = []
    for command, words in commands:
        args = train.build_parser(command).parse_args(shlex.split(words))
        cfg = train.setup_config(args)
        named.append((args.eval_only, cfg.MODEL.WEIGHTS))
    assert named == [
        (True, "tensormask_R_50_FPN_1x"),
        (True, "tensormask_R_50_FPN_6x"),
        (False, "torchvision_R_50"),
    ]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_rows_of_torchvision_are_torchvisions():
    rows = [model for model in MODELS.values() if "torchvision" in model.name]
    assert len(rows) == 9
    for model in rows:
        weights = get_weight(model.source.split()[-1])
        assert model.url == weights.url
        assert f"-{model.sha256}.pth" in weights.url
        assert model.metrics["top-1"] == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]


@pytest.mark.parametrize("name", [model.name for model in MODELS.values() if model.config])
def test_configs(name):
    cfg = get_config(name)
    assert cfg.MODEL.META_ARCHITECTURE == "TensorMask"
    assert f"R_{cfg.MODEL.RESNETS.DEPTH}_" in name
    if MODELS[name].url is not None:
        assert cfg.MODEL.WEIGHTS == name
    else:
        assert cfg.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-101.pkl"


def test_names_without_a_config():
    with pytest.raises(ValueError, match="nearest name is 'tensormask_R_50_FPN_6x'"):
        get_config("tensormask_R_50_FPN_6")
    with pytest.raises(ValueError, match="MSRA_R_50 is a backbone"):
        get_config("MSRA_R_50")


def test_build(tmp_path):
    trained = build("quickstart", device="cpu")
    assert (trained.training, trained.num_classes) == (True, 6)
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    model = build("quickstart", num_classes=2, weights=tmp_path / "model.pth", device="cpu")
    differing = [
        name
        for name, value in trained.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    ]
    assert differing == ["head.cls_score.weight", "head.cls_score.bias"]


# ---- resolve ----


@pytest.mark.parametrize(
    "name, url",
    [
        ("tensormask_R_50_FPN_6x", R_50_6X),
        (R_50_6X.replace(DETECTRON2_URL, "detectron2://"), R_50_6X),
        ("https://host/a.pkl?b=c", "https://host/a.pkl?b=c"),
        ("HTTP://host/a.pkl", "HTTP://host/a.pkl"),
    ],
)
def test_urls(downloaded, name, url):
    assert resolve(name) == Path("local")
    assert downloaded == [(url, None)]


@pytest.mark.parametrize(
    "name, weights",
    [
        ("torchvision://resnet18", "ResNet18_Weights.IMAGENET1K_V1"),
        ("torchvision://resnet34", "ResNet34_Weights.IMAGENET1K_V1"),
        ("torchvision://resnet50", "ResNet50_Weights.IMAGENET1K_V1"),
        ("torchvision://resnet101", "ResNet101_Weights.IMAGENET1K_V1"),
        ("torchvision_R_50", "ResNet50_Weights.IMAGENET1K_V1"),
        ("torchvision_R_101_V2", "ResNet101_Weights.IMAGENET1K_V2"),
        ("torchvision://mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V1"),
        ("torchvision://ResNet50_Weights.IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"),
        (get_weight("ResNet50_Weights.IMAGENET1K_V2").url, "ResNet50_Weights.IMAGENET1K_V2"),
    ],
)
def test_torchvision_with_its_hash(downloaded, name, weights):
    resolve(name)
    ((url, sha256),) = downloaded
    assert url == get_weight(weights).url
    assert len(sha256) == 8
    assert url.endswith(f"-{sha256}.pth")


def test_a_hash_in_the_table_is_used(downloaded, monkeypatch):
    row = MODELS["tensormask_R_50_FPN_6x"]._replace(sha256="12ab")
    monkeypatch.setitem(MODELS, row.name, row)
    resolve(R_50_6X)
    assert downloaded == [(R_50_6X, "12ab")]


def test_paths(downloaded, tmp_path):
    for name in ("a.pth", "./name", "folder/name", "/none", "C:\\a.pth", Path("name")):
        assert resolve(name) == Path(name)
    (tmp_path / "bare").write_text("a file")
    assert resolve("bare") == Path("bare")
    (tmp_path / "MSRA_R_50").mkdir()  # a folder is not a file
    assert resolve("MSRA_R_50") == Path("local")
    (tmp_path / "MSRA_R_101").write_text("a file")
    assert resolve("MSRA_R_101") == Path("MSRA_R_101")
    assert len(downloaded) == 1


def test_file_urls(downloaded, tmp_path):
    path = tmp_path / "with space.pth"
    assert resolve(path.as_uri()) == path
    assert resolve(path.as_uri().replace("file:///", "file://localhost/")) == path
    assert downloaded == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("tensormask_R50_6x", "nearest name is 'tensormask_R_50_FPN_6x'"),
        ("", "'' is not a file or a model of the zoo"),
        ("htps://host/a.pkl", "'htps' is not a kind of URL; the nearest name is 'https'"),
        ("ftp://host/a.pkl", "Known: https, http, hf, detectron2, torchvision, file"),
        ("torchvision://resnet51", "nearest name is 'resnet50'"),
        ("torchvision://resnet152", "'resnet152' is not one of torchvision's backbones"),
        ("torchvision://ResNet50_Weights.DEFAULT", "'ResNet50_Weights.DEFAULT' is not one of"),
        ("tensormask_R_101_FPN_6x", "no weights of tensormask_R_101_FPN_6x were released"),
        ("file://host/a.pth", "file:///folder/file"),
        ("file:///", "file:///folder/file"),
    ],
)
def test_invalid_names_are_refused(downloaded, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(name)
    assert downloaded == []


def test_from_a_server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as server:
        url = server.add("/a.pkl", Answer(b"weights"))
        assert resolve(url).read_bytes() == b"weights"
    assert resolve(url).read_bytes() == b"weights"


# ---- any text ----

PIECES = st.sampled_from(
    [
        *("/", "..", ".", "\\", "%2e%2e", "%2F", "%00", "\0", "?", "#", "@", ":", "[", "]", "::1"),
        *("host", ":99999", ".pkl", "\ud800", "a" * 300, "\n", " ", "~", "localhost", "模型"),
        *("resnet50", "ResNet50_Weights.IMAGENET1K_V2", *MODELS),
    ]
)
SCHEMES = st.sampled_from([f"{scheme}://" for scheme in (*downloads._SCHEMES, "ftp", "")] + [""])
NAMES = st.text() | st.tuples(SCHEMES, st.lists(PIECES | st.text(max_size=5))).map(
    lambda drawn: drawn[0] + "".join(drawn[1])
)


@given(NAMES)
@settings(max_examples=fuzz_examples(), deadline=None)
@example("https://host/a/../../../../b.pkl")
@example("https://host/" + "a" * 300 + ".pkl")
@example("file:///%00")
def test_any_text_is_a_path_or_a_value_error(name):
    asked = []

    def no_download(url, sha256):
        asked.append(url)
        return cache_path(url)

    with (
        patch.object(downloads, "download", no_download),
        patch.object(downloads, "find_on_hub", Path),  # its names: tests/hub
        patch("socket.socket") as socket,
    ):
        try:
            path = resolve(name)
        except ValueError:
            return
        finally:
            assert not socket.called
    assert isinstance(path, Path)
    if asked:
        folder = cache_folder()
        assert path.parent.parent == folder
        # The parts are names to every file system.
        for part in path.relative_to(folder).parts:
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,255}", part)
            assert part not in (os.curdir, os.pardir)
