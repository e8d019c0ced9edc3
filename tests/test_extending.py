"""The examples of docs/extending*.md: each runs after the setup, with a small model."""

import copy
import re
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import fork
import pytest
import torch
from torch.testing import assert_close

import tensormask
from tensormask import TensorMask
from tensormask.data.shapes import write_split
from tensormask.engine.resume import load_checkpoint
from tensormask.modeling import backbone

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("extending*.md"))
EXAMPLES = {
    section.partition("\n")[0]: section.partition("```python\n")[2].partition("```")[0]
    for page in PAGES
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
}
del EXAMPLES["Reference"]  # tests/engine/test_callbacks.py
SMALL = {"fpn_channels": 16, "cls_channels": 16, "bbox_channels": 16, "mask_channels": 16}
SMALL |= {"num_convs": 1, "score_threshold": 0.3}

SETUP = {"depth": 18, "num_classes": 2, "norm": "GN", "freeze_at": 0}
build = TensorMask.build


@lru_cache
def model_of_setup():
    torch.manual_seed(0)
    return build(**SMALL, **SETUP)


def build_small(**options):
    return copy.deepcopy(model_of_setup()) if options == SETUP else build(**SMALL | options)


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs an example in an empty folder, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    train = tensormask.train

    def train_shortly(cfg, **options):
        """One step with two images, and an evaluation on them if the example is about it."""
        write_split("val", 2, tmp_path)
        shapes = (f"{tmp_path}/annotations.json@{tmp_path}/images",)
        evaluated = "evaluators" in options or "callbacks" in options
        cfg.merge_from_list([
            *("DATASETS.TRAIN", shapes if cfg.DATASETS.TRAIN else ()),
            *("DATASETS.TEST", shapes if evaluated else (), "TEST.NUM_VISUALIZED", 0),
            *("SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
            *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 16, "TEST.ORACLE_ON", False),
            *("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD // 100, "TEST.EXPECTED_RESULTS", []),
            *("OUTPUT_DIR", "output"),
        ])  # fmt: skip
        return train(cfg, **options)

    monkeypatch.setitem(backbone._BLOCKS, 18, (backbone.BasicBlock, [1, 1, 1, 1]))
    monkeypatch.setattr(TensorMask, "build", build_small)
    monkeypatch.setattr(tensormask, "train", train_shortly)

    def run(*headings):
        variables = {}
        for heading in ("Setup", *headings):
            exec(EXAMPLES[heading], variables)
        return SimpleNamespace(**variables)

    return run


def losses(example, model=None):
    """Return the losses of two images."""
    samples = [example.Discs()[i] for i in (1, 2)]
    model = (model or example.model).train()
    return model([s["image"] for s in samples], [s["target"] for s in samples])


def assert_trains(example):
    sum(losses(example).values()).backward()
    gradients = [p.grad for p in example.model.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)


def assert_trained(example, name="output/model_final.pth"):
    weights = torch.load(name, weights_only=True)
    weights = weights.get("model", weights)
    assert all(value.isfinite().all() for value in weights.values())
    return weights


# ---- examples that need no check of their own, or a short one ----


def setup(example):
    target = example.Discs()[1]["target"]
    for (x0, y0, x1, y1), mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        edges = mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]
        assert all(edge.any() for edge in edges)
    assert_trains(example)


def own_loop(example):
    assert sorted(example.detection) == ["boxes", "labels", "masks", "scores"]
    weights = assert_trained(example, "model.pth")
    assert_close(weights, dict(example.model.state_dict()))


def validation_loss(example):
    """Without batch statistics, and without a collective."""
    assert example.model.training
    assert not any(part.training for part in example.model.children())
    example.model.sum_over_ranks = pytest.fail
    assert 0 < example.validation_loss(example.model, example.loader) < 100


def own_backbone(example):
    assert example.model.windows.strides == (4, 8, 16, 32, 64, 128)
    assert_trains(example)


def own_mask_loss(example):
    losses(example)["loss_mask"].backward()
    masks = torch.tensor([[[False, True], [True, True]]])
    good, bad = (example.tversky_and_bce(masks * sign - sign / 2, masks) for sign in (20.0, -20.0))
    assert good < 1e-3
    assert bad > 10
    assert example.tversky_and_bce(torch.zeros(0, 2, 2), masks[:0]) == 0


def own_box_loss(example):
    windows = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    assert example.ciou_loss(torch.zeros(1, 4), torch.zeros(1, 4), windows).abs() < 1e-6
    losses(example)["loss_box_reg"].backward()


def own_assignment(example):
    windows, grids = example.model.windows, example.model.windows.grids((96, 96))
    close = torch.tensor([[20.0, 20.0, 40.0, 40.0], [22.0, 22.0, 43.0, 43.0]])
    boxes_per_image = [close, torch.zeros(0, 4), close[:1], close[:1] * 100]
    assignment = example.best_windows(boxes_per_image, windows, grids)
    counts = torch.bincount(assignment.image * 2 + assignment.object, minlength=7).tolist()
    assert counts[2:] == [0, 0, 9, 0, 0]  # no window contains the last
    assert all(0 < count < 9 for count in counts[:2])  # both want the same windows
    objects = torch.stack([boxes_per_image[i][k] for i, k in zip(*assignment[:2], strict=True)])
    assert (assignment.boxes[:, :2] <= objects[:, :2]).all()
    assert (assignment.boxes[:, 2:] >= objects[:, 2:]).all()
    assert_trains(example)


def own_evaluator(example):
    assert example.results["counting"]["mae"] >= 0


def freezing(example):
    frozen = {n.split(".")[0] for n, p in example.model.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone", "fpn"}
    assert example.model.backbone.res3[0].conv1.weight.requires_grad
    assert_trains(example)


def saliency(example):
    assert example.saliency.shape == (96, 96)
    assert example.saliency.sum() > 0


def figures(example):
    assert all(Path(f"{name}.png").stat().st_size for name in ("natural", "aligned", "scores"))
    masks, aligned = example.masks.sigmoid(), example.aligned
    assert_close(aligned[7, 7], masks[:, :, 7, 7])  # the centers of the masks
    assert_close(aligned[9, 4, 10, 12], masks[8, 15, 9, 4])


CHECKS = {
    "Setup": setup,
    "Own loop": own_loop,
    "Validation loss": validation_loss,
    "Own data in the trainer": assert_trained,
    "Own augmentation": assert_trained,
    "Own model in the trainer": assert_trained,
    "Own backbone: torchvision": own_backbone,
    "Own mask loss": own_mask_loss,
    "Own box loss": own_box_loss,
    "Own assignment": own_assignment,
    "Own evaluator": own_evaluator,
    "Early stopping": assert_trained,
    "Freezing": freezing,
    "Saliency map": saliency,
    "Figures of 4D tensors": figures,
}


OTHERS = ("accelerate", "Own backbone: timm", "DDP by hand", "Second-order loss", "Logger", "LoRA")


@pytest.mark.parametrize("heading", [heading for heading in EXAMPLES if heading not in OTHERS])
def test_examples(heading, run):
    CHECKS[heading](run(heading) if heading != "Setup" else run())


@pytest.mark.parametrize("heading", EXAMPLES)
def test_examples_are_short(heading):
    assert 0 < EXAMPLES[heading].count("\n") < 30


# ---- the others ----


def test_accelerate(run):
    pytest.importorskip("accelerate")
    run("accelerate")
    assert_trained(None, "model.pth")


def test_timm(run):
    pytest.importorskip("timm")
    own_backbone(run("Own backbone: timm"))


def test_ddp_by_hand(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def rank():
        torch.set_num_threads(1)
        run("DDP by hand")
        return 0

    assert fork.run_in_ranks(rank) == [0, 0]
    assert_trained(None, "model.pth")


def test_second_order_loss(run):
    """The gradient of the penalty by a weight is its finite difference, in float64."""
    example = run("Second-order loss")
    model = copy.deepcopy(example.model).double()
    image = example.Discs()[1]["image"].double()
    target = example.Discs()[1]["target"]
    weight = model.fpn.output["p2"].weight

    def penalty(shift=0.0):
        shifted = image.clone().requires_grad_()
        with torch.no_grad():
            weight[0, 0, 1, 1] += shift
        loss = sum(model([shifted], [target]).values())
        (gradient,) = torch.autograd.grad(loss, shifted, create_graph=True)
        return gradient.square().sum()

    (expected,) = torch.autograd.grad(penalty(), weight)
    step = 1e-6
    difference = penalty(step) - penalty(-2 * step)
    assert_close(expected[0, 0, 1, 1], difference / (2 * step), rtol=1e-4, atol=1e-9)
    assert expected[0, 0, 1, 1] != 0


def test_logger(run, monkeypatch):
    logged = []
    curves = SimpleNamespace(id="abc", log=lambda metrics, step: logged.append((step, *metrics)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: curves))
    run("Logger")
    assert [step for step, *_ in logged] == [1, 1]
    assert "total_loss" in logged[0]
    assert "segm/AP" in logged[1]
    callbacks = load_checkpoint(Path("output/model_final.pth"))["run"]["callbacks"]
    assert callbacks == {"WandbLogger": {"id": "abc"}}


def test_lora(run):
    """It changes nothing at first, and only its weights are trained."""
    example, before = run("LoRA"), run()
    assert_close(losses(example), losses(before))
    assert_trains(example)
    trained = [name for name, p in example.model.named_parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all(re.search(r"_subnet\.0\.(up|down)\.weight", name) for name in trained)
    up = [p for name, p in example.model.named_parameters() if name.endswith("up.weight")]
    assert all(p.grad.any() for p in up)
