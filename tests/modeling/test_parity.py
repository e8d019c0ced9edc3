"""Numbers of detectron2, reproduced from its YAML files and checkpoints."""

import json

import numpy as np
import pytest
import torch
from parity import DATA, build_model, get_cfg, load_case, make_image, target
from pycocotools import mask as mask_utils
from torch.testing import assert_close

from tensormask.checkpoint.names import to_our_names
from tensormask.engine.solver import build_lr_scheduler, build_optimizer
from tensormask.layers import swap_align2nat, swap_align2nat_at
from tensormask.modeling.assignment import assign
from tensormask.modeling.build import build_windows


@pytest.mark.parametrize("i", range(5))
def test_swap_align2nat(i: int) -> None:
    cases, arrays = load_case("swap_align2nat")
    lambda_val, pad_val = cases[i]["ratio"], cases[i]["pad"]
    x, y, grad_y, grad_x = (torch.tensor(arrays[f"{name}{i}"]) for name in ("x", "y", "gy", "gx"))
    x.requires_grad_()
    out = swap_align2nat(x, lambda_val, pad_val)
    assert_close(out, y)
    assert_close(torch.autograd.grad(out, x, grad_y)[0], grad_x)

    n, _, height, width = y.shape
    windows = torch.cartesian_prod(torch.arange(n), torch.arange(height), torch.arange(width))
    out = swap_align2nat_at(x, windows, lambda_val, pad_val)
    assert_close(out.flatten(1), y.permute(0, 2, 3, 1).flatten(0, 2))
    grad_out = grad_y.permute(0, 2, 3, 1).reshape(out.shape)
    assert_close(torch.autograd.grad(out, x, grad_out)[0], grad_x)


@pytest.mark.parametrize("kind", ["bipyramid", "natural"])
def test_inference(kind: str, tmp_path) -> None:
    case, arrays = load_case(f"inference_r50_{kind}")
    model = build_model(case, kind, tmp_path).eval()
    for n, entry in enumerate(case["images"]):
        with torch.inference_mode():
            _compare_dense(model, make_image(entry), arrays)
            size = (entry["height"], entry["width"])
            (detection,) = model([make_image(entry)], output_sizes=[size])
        _compare_detections(detection, arrays, n, case["detections"][n], size)


def _compare_dense(model, image: torch.Tensor, arrays: dict) -> None:
    features = model.fpn(model.backbone(model.preprocess([image])))
    logits, deltas = model.head(features)
    masks = model.mask_head.dense(features)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for k in range(6):
        moments = torch.stack([features[k].mean(), features[k].std()])
        assert_close(moments, torch.tensor(arrays[f"p{k + 2}_mean_std"]), **close)
        assert_close(logits[k][:, ::7, ::5, ::5], torch.tensor(arrays[f"logits{k}"]), **close)
        assert_close(deltas[k][:, :, ::4, ::4], torch.tensor(arrays[f"deltas{k}"]), **close)
        for size, mask in enumerate(masks[k]):
            sample = mask[:, :: max(1, mask.shape[1] // 40), ::4, ::4]
            assert_close(sample, torch.tensor(arrays[f"masks{k}_{size}"]), **close)


def _compare_detections(detection, arrays, n: int, counts: list[str], size) -> None:
    """Match detections by class, box and score: nearly equal scores can be in another order."""
    boxes, scores, classes = (arrays[f"{name}_{n}"] for name in ("boxes", "scores", "classes"))
    assert len(detection["scores"]) == len(scores)
    np.testing.assert_allclose(detection["scores"].numpy(), scores, atol=1e-4)
    for box, score, label, rle in zip(boxes, scores, classes, counts, strict=True):
        distance = (detection["boxes"] - torch.tensor(box)).abs().amax(1)
        distance[detection["labels"] != label] = torch.inf
        # Clipped boxes can be equal: of those that match, take the one with the nearest score.
        difference = (detection["scores"] - float(score)).abs()
        i = int(torch.where(distance < 0.01, difference, torch.inf).argmin())
        assert distance[i] < 0.01
        assert abs(float(detection["scores"][i]) - score) < 1e-4
        ours = mask_utils.encode(np.asfortranarray(detection["masks"][i].numpy().astype(np.uint8)))
        theirs = {"size": list(size), "counts": rle.encode()}
        assert mask_utils.iou([ours], [theirs], [0])[0, 0] >= 0.99


@pytest.mark.parametrize("kind", ["bipyramid", "natural"])
def test_losses(kind: str, tmp_path) -> None:
    case, _ = load_case(f"losses_r50_{kind}")
    model = build_model(case, kind, tmp_path).train()
    images = [make_image(entry) for entry in case["images"]]
    losses = model(images, [target(entry) for entry in case["images"]])
    assert {k: loss.item() for k, loss in losses.items()} == pytest.approx(case["losses"], rel=1e-4)
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    grad_norms = {name: parameters[name].grad.norm().item() for name in parameters.keys() - frozen}
    names = _our_names(kind, model)
    expected = {names[name]: norm for name, norm in case["grad_norms"].items()}
    assert grad_norms == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert frozen == {names[name] for name in case["frozen"]}


def test_foreground_windows() -> None:
    case, _ = load_case("losses_r50_bipyramid")
    windows = build_windows(get_cfg(case))
    size = tuple(max(entry[side] for entry in case["images"]) for side in ("height", "width"))
    boxes = [torch.tensor(entry["boxes"]) for entry in case["images"]]
    assignment = assign(boxes, windows, windows.grids(size))
    assert len(assignment.object) == case["num_foreground"]
    counts = [[sum(per_image) for per_image in sizes] for sizes in assignment.counts]
    assert counts == case["foreground_per_level_window"]


@pytest.mark.slow
def test_sgd_steps(tmp_path) -> None:
    case, _ = load_case("steps_r50_bipyramid")
    model = build_model(case, "bipyramid", tmp_path).train()
    cfg = get_cfg(case)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    names = _our_names("bipyramid", model)
    parameters = dict(model.named_parameters())
    for entry, step in zip(case["images"], case["steps"], strict=True):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(step["lr"], rel=1e-9)
        losses = model([make_image(entry)], [target(entry)])
        values = {name: loss.item() for name, loss in losses.items()}
        assert values == pytest.approx(step["losses"], rel=1e-4)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        for theirs, norm in step["update_norms"].items():
            ours = names[theirs]
            update = (parameters[ours].detach() - before[ours]).norm().item()
            # The update is a difference of float32 weights, which has their rounding error.
            rounding = 6e-8 * before[ours].norm().item()
            assert update == pytest.approx(norm, rel=1e-3, abs=rounding), ours


def _our_names(kind: str, model) -> dict[str, str]:
    """Return our parameter names by detectron2's."""
    shapes = json.loads((DATA / f"shapes_r50_{kind}.json").read_text())
    return to_our_names(shapes, "detectron2", model.windows.mask_sizes)[0]
