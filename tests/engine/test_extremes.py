"""Training and inference with extreme images and objects."""

import pytest
import tiny
import torch

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def train_and_infer(image, target, head="bipyramid"):
    """Check for finite losses and gradients, and valid detections; return losses, detections."""
    model = tiny.build(head, ["MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.0])
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()), losses
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.inference_mode():
        (detections,) = model([image])
    height, width = image.shape[-2:]
    assert detections["masks"].shape == (len(detections["scores"]), height, width)
    assert detections["boxes"].isfinite().all()
    assert detections["scores"].isfinite().all()
    return losses, detections


@pytest.mark.parametrize(
    "size, with_object", [((1, 1), True), ((1, 33), False), ((1, 3000), True), ((3000, 1), False)]
)
def test_thin_images(size, with_object):
    height, width = size
    boxes = [[0.0, 0.0, width, height]] if with_object else []
    train_and_infer(tiny.make_image(*size), tiny.target(height, width, boxes))


@pytest.mark.parametrize("head", ["natural", "bipyramid", "upscale_aligned"])
def test_no_object(head):
    losses, _ = train_and_infer(tiny.make_image(96, 64), tiny.target(96, 64, []), head)
    assert losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert losses["loss_cls"] > 0


def test_two_thousand_objects():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2000, 2, generator=generator) * 96
    boxes = torch.cat([corners, corners + 4 + 28 * torch.rand(2000, 2, generator=generator)], 1)
    _, detections = train_and_infer(
        tiny.make_image(128, 128), tiny.target(128, 128, boxes.tolist())
    )
    assert len(detections["scores"]) == 100


def test_objects_larger_than_the_image():
    target = tiny.target(64, 96, [[0.0, 0.0, 96.0, 64.0]] * 2)
    target["boxes"] = torch.tensor([[-200.0, -300.0, 400.0, 500.0], [-5.0, -5.0, 96.0, 64.0]])
    train_and_infer(tiny.make_image(64, 96), target)


def test_a_huge_object_in_a_tiny_image():
    target = tiny.target(1, 1, [[0.0, 0.0, 1.0, 1.0]])
    target["boxes"] = torch.tensor([[-1e6, -1e6, 1e6, 1e6]])
    train_and_infer(tiny.make_image(1, 1), target)


def test_a_black_and_a_white_image():
    for value in (0, 255):
        image = torch.full((3, 64, 64), value, dtype=torch.uint8)
        train_and_infer(image, tiny.target(64, 64, [[0.0, 0.0, 64.0, 64.0]]))
