"""The model as its users call it: losses, gradients, detections, and options that remove parts."""

import pickle
from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch
from tiny import HEADS, build, get_cfg, make_image, target, with_detections
from torch.testing import assert_close
from torchvision.ops import box_iou

import tensormask
from tensormask.layers import paste_masks

BOXES = [[20.0, 30.0, 60.0, 70.0], [70.0, 10.0, 90.0, 50.0]]


@pytest.mark.parametrize("head", HEADS)
def test_training_step(head: str) -> None:
    """Images of different sizes, one without objects: finite losses and gradients."""
    model = build(head).train()
    images = [make_image(100, 140), make_image(96, 80)]
    losses = model(images, [target(100, 140, BOXES), target(96, 80, [])])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", HEADS)
def test_no_objects(head: str) -> None:
    """Box and mask losses are 0, with gradients for all parameters, as all ranks need them."""
    model = build(head).train()
    losses = model([make_image(64, 64)], [target(64, 64, [])])
    assert losses["loss_box_reg"].item() == losses["loss_mask"].item() == 0
    assert losses["loss_cls"].item() > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_losses_are_per_foreground_window() -> None:
    """A repeated image doubles the positive windows and keeps the losses."""
    model = build().train()
    once = model([make_image(96, 96)], [target(96, 96, BOXES[:1])])
    twice = model([make_image(96, 96)] * 2, [target(96, 96, BOXES[:1])] * 2)
    assert_close(once, twice, rtol=1e-5, atol=1e-6)


def sum_over_two_equal_ranks(counts: torch.Tensor) -> torch.Tensor:
    return 2 * counts


def test_losses_use_the_sum_over_ranks() -> None:
    """The mean over two ranks with equal batches is the loss of one. Copies keep the sum."""
    model = tensormask.build_model(get_cfg(), sum_over_ranks=sum_over_two_equal_ranks).train()
    inputs = [make_image(96, 96)], [target(96, 96, BOXES[:1])]
    plain = build().train()
    model.load_state_dict(plain.state_dict())
    expected = plain(*inputs)
    for copy in (model, deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses = copy(*inputs)
        assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    # A second rank with nine times as many positive windows: five times the mean of both.
    model.sum_over_ranks = lambda counts: torch.stack([10 * counts[0], 2 * counts[1]])
    ratio = model(*inputs)["loss_cls"] / expected["loss_cls"]
    assert ratio.item() == pytest.approx(1 / 5, rel=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_detections(head: str) -> None:
    model = with_detections(build(head, ["TEST.DETECTIONS_PER_IMAGE", 20]))
    images = [make_image(100, 140), make_image(96, 80, seed=1)]
    with torch.inference_mode():
        detections = model(images, output_sizes=[(50, 70), (96, 80)])
    for detection, (height, width) in zip(detections, [(50, 70), (96, 80)], strict=True):
        boxes, scores, labels, masks = (
            detection[k] for k in ("boxes", "scores", "labels", "masks")
        )
        assert 0 < len(scores) <= 20
        assert masks.shape == (len(scores), height, width)
        assert (masks.dtype, labels.dtype) == (torch.bool, torch.int64)
        assert set(labels.tolist()) <= {0, 1, 2}
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert boxes.shape == (len(scores), 4)
        assert (boxes >= 0).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_batch_equals_single_images(head: str) -> None:
    model = with_detections(build(head))
    images = [make_image(96, 128, seed=i) for i in range(3)]
    with torch.inference_mode():
        batch = model(images)
        singles = [model([image])[0] for image in images]
    for of_batch, single in zip(batch, singles, strict=True):
        assert of_batch.keys() == single.keys()
        assert_close(of_batch["scores"], single["scores"], rtol=1e-4, atol=1e-5)
        assert_close(of_batch["boxes"], single["boxes"], rtol=1e-3, atol=1e-2)
        assert (of_batch["masks"] == single["masks"]).float().mean() > 0.999


@pytest.mark.parametrize("scale", [1, 2])
def test_masks_are_pasted_into_their_windows(scale: int) -> None:
    """Masks fill their windows and boxes a quarter of them: masks keep the size of the windows."""
    opts = ["MODEL.TENSOR_MASK.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[44]]]
    model = with_detections(build("natural", [*opts, "TEST.DETECTIONS_PER_IMAGE", 20]))
    for layer, bias in ((model.mask_head.mask_pred[0], 20.0), (model.head.bbox_pred, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    with torch.no_grad():
        model.head.bbox_pred.bias[2:] = 0.75 * torch.tensor(0.25).log()
        (detection,) = model([make_image(128, 128)], output_sizes=[(128 * scale, 128 * scale)])
    complete, half = 0, 22 * scale
    for mask, (x0, y0, x1, y1) in zip(detection["masks"], detection["boxes"].tolist(), strict=True):
        center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
        if min(center_x, center_y) > 24 * scale and max(center_x, center_y) < 104 * scale:
            assert (x1 - x0, y1 - y0) == pytest.approx((11 * scale, 11 * scale), abs=1e-3)
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert rows.tolist() == list(range(round(center_y) - half, round(center_y) + half))
            assert columns.tolist() == list(range(round(center_x) - half, round(center_x) + half))
            complete += 1
    assert complete > 0


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_detect_returns_the_masks_of_forward_unpasted(head: str) -> None:
    model = with_detections(build(head, ["TEST.DETECTIONS_PER_IMAGE", 40]))
    images, sizes = [make_image(100, 140), make_image(96, 80, seed=1)], [(50, 70), (96, 80)]
    with torch.inference_mode():
        pasted = model(images, output_sizes=sizes)
        unpasted = model.detect(images, sizes)
        assert len(model.detect(images)[0]["scores"]) > 0
    for full, cropped, size in zip(pasted, unpasted, sizes, strict=True):
        assert set(cropped) == {"boxes", "scores", "labels", "windows", "window_masks"}
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(full[name], cropped[name])
        assert cropped["windows"].shape == cropped["boxes"].shape
        masks = paste_masks(cropped["window_masks"], cropped["windows"], size)
        assert torch.equal(full["masks"], masks)
        assert masks.any()
        assert all(0 <= mask.min() <= mask.max() <= 1 for mask in cropped["window_masks"])


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_bfloat16_autocast(head: str) -> None:
    """A training step under autocast: losses in float32 and gradients, near those without."""
    model = build(head).train()
    inputs = [make_image(96, 112)], [target(96, 112, BOXES)]
    losses, grads = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(*inputs))
        model.zero_grad()
        sum(losses[-1].values()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.mask_head.parameters()]))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)  # of equal dtypes
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_checkpointed_heads_save_memory(head: str) -> None:
    """Equal losses and gradients; fewer bytes saved for the backward pass."""
    grads, saved, losses = [], [], []
    for on in (False, True):
        options = ["MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", on]
        model = build(head, [*options, "MODEL.TENSOR_MASK.NUM_CONVS", 4]).train()
        weights = {p.data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(x, weights=weights, sizes=sizes):
            if x.data_ptr() not in weights:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = sum(model([make_image(96, 112)], [target(96, 112, BOXES)]).values())
        saved.append(sum(sizes.values()))
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_close(losses[0], losses[1])
    assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert saved[1] < 0.9 * saved[0]  # the rest is the backbone's


def brute_force_nms(boxes, scores, labels, threshold: float) -> list[int]:
    """Best first, drop every box that overlaps a better one of its class."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        same = [k for k in kept if labels[k] == labels[i]]
        if not same or box_iou(boxes[i : i + 1], boxes[same]).max() <= threshold:
            kept.append(i)
    return kept


@pytest.mark.parametrize("box_on", [True, False])
def test_nms_on_the_boxes_of_masks(box_on: bool) -> None:
    """Against the dense masks of every candidate."""
    opts = [
        *("MODEL.TENSOR_MASK.IN_FEATURES", ["p2", "p3"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[44, 60], [88, 120]]),
        *("MODEL.TENSOR_MASK.NMS_ON", "masks", "MODEL.TENSOR_MASK.BOX_ON", box_on),
        *("TEST.DETECTIONS_PER_IMAGE", 6000, "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.2),
        *("MODEL.TENSOR_MASK.NMS_THRESH_TEST", 0.47),  # no IoU of small boxes is equal to it
    ]
    model = with_detections(build("bipyramid", opts))
    for pred in model.mask_head.mask_pred:
        torch.nn.init.normal_(pred.weight, std=0.5)
        torch.nn.init.constant_(pred.bias, -4.0)  # some masks are empty
    with torch.inference_mode():
        (detection,) = model([make_image(64, 96)])
        features, logits, *_ = model.dense([make_image(64, 96)])
        dense = model.mask_head.dense(features)
    boxes, scores, labels, num_empty = [], [], [], 0
    for level, x in enumerate(logits):
        for channel, y, column in (x[0].sigmoid() > 0.2).nonzero().tolist():
            size, label = divmod(channel, 3)
            mask = dense[level][size][0, :, y, column]
            side = round(len(mask) ** 0.5)
            inside = (mask.view(side, side) >= 0).nonzero().flip(1)  # (x, y)
            if len(inside) == 0:
                num_empty += 1
                continue
            window_side = 4 * 2**level * [11, 15][size]
            corner = torch.tensor([column, y]) * 4 * 2**level - window_side / 2
            low, high = inside.amin(0), inside.amax(0) + 1
            boxes.append(corner.repeat(2) + torch.cat([low, high]) * window_side / side)
            scores.append(x[0, channel, y, column].sigmoid())
            labels.append(label)
    boxes, scores, labels = torch.stack(boxes), torch.stack(scores), torch.tensor(labels)
    kept = brute_force_nms(boxes, scores, labels, 0.47)
    assert num_empty > 0
    assert 10 < len(kept) < len(boxes)
    clipped = boxes[kept].clamp(min=0).minimum(torch.tensor([96.0, 64.0] * 2))
    visible = (clipped[:, 2:] > clipped[:, :2]).all(1)
    if not box_on:
        assert_close(detection["boxes"], clipped[visible], atol=1e-3, rtol=0)
        assert_close(detection["scores"], scores[kept][visible])
        assert torch.equal(detection["labels"], labels[kept][visible])
    else:  # boxes are the regressed ones, some outside of the image
        apart = (detection["scores"][:, None] - scores[kept]).abs().amin(1)
        assert apart.max() < 1e-6
        assert len(detection["scores"]) > 0.8 * len(kept)


def test_nms_on_masks_computes_each_window_once(monkeypatch) -> None:
    """All classes of all windows are candidates: masks are class-agnostic."""
    opts = ["MODEL.TENSOR_MASK.NMS_ON", "masks", "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.0]
    model = build(opts=[*opts, "TEST.DETECTIONS_PER_IMAGE", 5]).eval()
    iter_masks = Mock(side_effect=model.mask_head.iter_masks)
    monkeypatch.setattr(model.mask_head, "iter_masks", iter_masks)
    with torch.inference_mode():
        model([make_image(32, 64), make_image(64, 64, seed=1)])
    calls = iter_masks.call_args_list
    num_windows = [sum(len(rows) for _, _, rows in call.args[1]) for call in calls]
    # 2 images padded to 64 x 64 px, 2 window sizes, grids of 16 x 16, 8 x 8, ... windows.
    assert num_windows[0] == 2 * 2 * sum(side**2 for side in (16, 8, 4, 2, 1, 1))
    assert num_windows[1] <= 2 * 5


def test_without_a_box_head() -> None:
    opts = ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"]
    model = build(opts=opts).train()
    assert not any(name.startswith("head.bbox") for name, _ in model.named_parameters())
    losses = model([make_image(96, 96)], [target(96, 96, BOXES)])
    assert set(losses) == {"loss_cls", "loss_mask"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("nms_on", ["boxes", "masks"])
def test_no_detections(nms_on: str) -> None:
    opts = ["MODEL.TENSOR_MASK.NMS_ON", nms_on, "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.99]
    (detection,) = build(opts=opts).eval()([make_image(40, 50)], output_sizes=[(80, 100)])
    assert detection["boxes"].shape == (0, 4)
    assert detection["masks"].shape == (0, 80, 100)
    assert detection["scores"].shape == detection["labels"].shape == (0,)


def test_without_masks() -> None:
    model = with_detections(build(opts=["MODEL.MASK_ON", False]))
    (detection,) = model([make_image(64, 64)])
    (unpasted,) = model.detect([make_image(64, 64)])
    assert set(detection) == set(unpasted) == {"boxes", "scores", "labels"}
    losses = model.train()([make_image(96, 96)], [target(96, 96, BOXES[:1])])
    assert set(losses) == {"loss_cls", "loss_box_reg"}


def test_fewer_levels_and_sizes() -> None:
    opts = [
        "MODEL.TENSOR_MASK.IN_FEATURES", ["p3", "p4"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[88], [176]],
    ]  # fmt: skip
    model = build(opts=opts)
    assert model.windows.mask_sizes == [11]
    assert model.mask_head.lambdas == [1, 2]
    losses = model.train()([make_image(128, 128)], [target(128, 128, [[20, 20, 90, 90]])])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(with_detections(model)([make_image(128, 128)])[0]["scores"]) > 0
