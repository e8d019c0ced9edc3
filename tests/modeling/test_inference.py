"""Inference: candidates against a plain search, and options for speed."""

import pytest
import torch
from tiny import build, make_image, with_detections
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.candidates import find_candidates
from tensormask.modeling.windows import Windows

WINDOWS = Windows((4, 8), ((44, 60), (88, 120)))
BOX_WEIGHTS = (1.5, 1.5, 0.75, 0.75)


def dense_outputs() -> tuple[list[Tensor], list[Tensor]]:
    """Return logits of 2 sizes and 3 classes, some of them equal, and deltas."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 5, 7, generator=generator), torch.randn(6, 3, 4, generator=generator)]
    logits = [(x * 2).round() / 2 for x in logits]
    deltas = [torch.randn(8, *x.shape[1:], generator=generator) for x in logits]
    return logits, deltas


def plain_search(logits, deltas, threshold: float, num_candidates: int) -> list[tuple]:
    """Return (score, label, level, size, y, x, box) of pairs above the threshold, best first."""
    pairs = []
    for level, x in enumerate(logits):
        for channel, y, column in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
            score = float(x[channel, y, column].sigmoid())
            if score > threshold:
                size, label = divmod(channel, 3)
                delta = deltas[level][size * 4 : size * 4 + 4, y, column]
                index = (torch.tensor([i]) for i in (level, size, y, column))
                box = decode_boxes(delta[None], WINDOWS.boxes(*index), BOX_WEIGHTS)[0]
                pairs.append((score, label, level, size, y, column, box))
    return sorted(pairs, key=lambda pair: -pair[0])[:num_candidates]


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("num_candidates", [1, 20, 6000])
def test_candidates_equal_a_plain_search(threshold: float, num_candidates: int) -> None:
    logits, deltas = dense_outputs()
    last = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in logits]  # channels_last
    actual, of_channels_last = (
        find_candidates(
            x,
            lambda *index: torch.stack(
                [
                    deltas[k].unflatten(0, (-1, 4))[s, :, y, x]
                    for k, s, y, x in zip(*index, strict=True)
                ]
            ),
            WINDOWS,
            box_weights=BOX_WEIGHTS,
            score_threshold=threshold,
            num_candidates=num_candidates,
        )
        for x in (logits, last)
    )
    assert all(map(torch.equal, actual, of_channels_last))
    expected = plain_search(logits, deltas, threshold, num_candidates)
    assert len(actual.scores) == len(expected)
    assert_close(actual.scores, torch.tensor([pair[0] for pair in expected]))
    # Of equal scores at the end of the list, any may be returned.
    certain = [i for i, pair in enumerate(expected) if pair[0] > expected[-1][0]]
    if len(expected) < num_candidates:
        certain = range(len(expected))
    for i in certain:
        _, label, level, size, y, x, box = expected[i]
        index = [t[i : i + 1] for t in (actual.level, actual.size, actual.y, actual.x)]
        assert [actual.labels[i].item(), *map(int, index)] == [label, level, size, y, x]
        assert_close(actual.boxes[i], box)
        assert torch.equal(actual.windows[i : i + 1], WINDOWS.boxes(*index))


@pytest.mark.parametrize(("threshold", "lowest"), [(0.0, 0.0), (0.05, 0.05), (0.6, 0.36)])
def test_predicted_ious_rescale_scores(threshold: float, lowest: float) -> None:
    """The candidates above ``lowest``, those of them with a rescaled score above the threshold."""
    logits, deltas = dense_outputs()
    ious = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(1))

    def outputs_at(*index: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.cat([deltas[k].unflatten(0, (-1, 4))[s, :, y, x], ious[k, s, y, x, None]])
                for k, s, y, x in zip(*index, strict=True)
            ]
        )

    options = {"box_weights": BOX_WEIGHTS, "num_candidates": 6000, "score_threshold": threshold}
    actual = find_candidates(logits, outputs_at, WINDOWS, mask_iou=True, **options)
    rescaled = []
    for score, label, level, size, y, x, box in plain_search(logits, deltas, lowest, 6000):
        final = (score * float(ious[level, size, y, x].sigmoid())) ** 0.5
        if final > threshold:
            rescaled.append((final, label, box))
    rescaled.sort(key=lambda pair: -pair[0])
    assert_close(actual.scores, torch.tensor([score for score, _, _ in rescaled]))
    assert_close(actual.boxes, torch.stack([box for _, _, box in rescaled]))
    assert actual.labels.tolist() == [label for _, label, _ in rescaled]


def detections(opts: list, images: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.inference_mode():
        return with_detections(build(opts=opts))(images)


def assert_alike(actual: list[dict], expected: list[dict], tolerance: float) -> None:
    """Compare as sets: nearly equal scores may be in another order."""
    for one, other in zip(actual, expected, strict=True):
        assert len(one["scores"]) == pytest.approx(len(other["scores"]), rel=0.1)
        distance = (one["boxes"][:, None] - other["boxes"]).abs().amax(2)
        distance[one["labels"][:, None] != other["labels"]] = torch.inf
        # Clipped boxes can be equal: of those that match, take the one with the nearest score.
        apart = (one["scores"][:, None] - other["scores"]).abs()
        partner = torch.where(distance < 100 * tolerance, apart, torch.inf).min(1)
        matched = partner.values < tolerance
        assert matched.float().mean() >= 0.75  # NMS can choose either of two near scores
        same = (one["masks"] == other["masks"][partner.indices])[matched]
        assert same.float().mean() > 1 - tolerance


def test_options_for_speed_keep_the_detections() -> None:
    images = [make_image(96, 128), make_image(64, 96, seed=1)]
    expected = detections([], images)
    last, autocast = ["MODEL.CHANNELS_LAST", True], ["TEST.AMP.ENABLED", True]
    for opts, tolerance in (last, 1e-4), (autocast, 0.03), (last + autocast, 0.03):
        assert_alike(detections(opts, images), expected, tolerance)


def test_autocast_of_inference() -> None:
    """Features of masks are in half precision, results are not."""
    dtypes = []
    for enabled in (False, True):
        model = with_detections(build(opts=["TEST.AMP.ENABLED", enabled]))
        model.mask_head.mask_subnet.register_forward_hook(lambda *a: dtypes.append(a[2].dtype))
        with torch.inference_mode():
            (detection,) = model([make_image(64, 64)])
        assert detection["boxes"].dtype == detection["scores"].dtype == torch.float32
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    assert dtypes[0] == torch.float32


@pytest.mark.parametrize("on", [False, True])
def test_channels_last_is_the_format_of_the_features(on: bool) -> None:
    model, images = build(opts=["MODEL.CHANNELS_LAST", on]), [make_image(64, 96)]
    for x in model.preprocess(images), model.dense(images).features[0]:
        assert x.is_contiguous(memory_format=torch.channels_last) == on


def test_size_divisor() -> None:
    model = build(opts=["MODEL.SIZE_DIVISOR", 128]).eval()
    assert model.preprocess([make_image(96, 130)]).shape == (1, 3, 128, 256)
    with torch.inference_mode():
        (detection,) = model([make_image(96, 130)])
    assert detection["masks"].shape[1:] == (96, 130)


def test_options_of_a_call() -> None:
    """Each option of `detect` against all detections; None takes the model's own."""
    few = ["TEST.DETECTIONS_PER_IMAGE", 6000, "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.3]
    model, images = with_detections(build(opts=few)), [make_image(64, 96)]

    def scores(**options) -> list[tuple[float, int]]:
        (d,) = model.detect(images, **options)
        return list(zip(d["scores"].tolist(), d["labels"].tolist(), strict=True))

    with torch.inference_mode():
        every = scores()
        assert {label for _, label in every} == {0, 1, 2}
        assert scores(score_threshold=0.5) == [pair for pair in every if pair[0] > 0.5] != every
        assert scores(num_detections=7) == every[:7]
        for classes in ([2], (0, 2), []):
            expected = [score for score, label in every if label in classes]
            assert [pair[0] for pair in scores(classes=classes)] == pytest.approx(expected)
            assert {label for _, label in scores(classes=classes)} == set(classes)
        agnostic = scores(class_agnostic_nms=True)
        assert 0 < len(agnostic) < len(every)
        boxes = model.detect(images, class_agnostic_nms=True, num_detections=50)[0]["boxes"]
        # Clipping to the image changes the IoU of boxes that reach beyond it.
        inside = (boxes > 0).all(1) & (boxes < torch.tensor([96.0, 64.0] * 2)).all(1)
        assert box_iou(boxes[inside], boxes[inside]).fill_diagonal_(0).max() <= 0.5
        model.class_agnostic_nms = True
        assert scores() == agnostic
    for options in ({"classes": [3]}, {"score_threshold": 1.0}, {"num_detections": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            scores(**options)


def test_other_classes_are_no_candidates() -> None:
    """The limit of candidates applies to the given classes only."""
    model = with_detections(build(opts=["MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST", 1]))
    (detection,) = model.detect([make_image(64, 96)])
    other = (detection["labels"][0].item() + 1) % 3
    (of_other,) = model.detect([make_image(64, 96)], classes=[other])
    assert of_other["labels"].tolist() == [other]


def test_class_agnostic_nms_is_an_option_of_the_config() -> None:
    assert build(opts=["TEST.CLASS_AGNOSTIC_NMS", True]).class_agnostic_nms
    assert not build().class_agnostic_nms
