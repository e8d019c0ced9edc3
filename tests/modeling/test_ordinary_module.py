"""A model is an ordinary `nn.Module`: copies, files, dtypes, threads, gradients to the images."""

import copy
import io
import pickle
import threading

import pytest
import torch
from tiny import build, make_image, target, with_detections
from torch import nn
from torch.testing import assert_close

BOXES = [[20.0, 30.0, 60.0, 70.0], [70.0, 10.0, 90.0, 50.0]]
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.CHANNELS_LAST", True]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies() -> None:
    model = with_detections(build(opts=FROZEN))
    images = [make_image(64, 96)]
    copies = [saved(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.inference_mode():
        expected, *others = (each(images)[0] for each in (model, *copies))
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_model(dtype: torch.dtype) -> None:
    """Losses and detections near those of float32, whatever the dtype of the images."""
    model = with_detections(build(opts=FROZEN))
    image, truth = make_image(64, 96), target(64, 96, BOXES[:1])
    with torch.inference_mode():
        scores = model([image])[0]["scores"]
    losses = model.train()([image], [truth])
    batch = model.preprocess([image])
    model.to(dtype)
    for other in (torch.float32, torch.float64, dtype):
        actual = model.preprocess([(image / 255).to(other)])
        assert actual.dtype == dtype
        assert_close(actual.float(), batch, rtol=0.02, atol=0.02)
    precise = torch.promote_types(dtype, torch.float32)
    mean, std = model.pixel_mean.to(precise), model.pixel_std.to(precise)
    assert torch.equal(model.preprocess([image])[0], ((image.flip(0) - mean) / std).to(dtype))
    with torch.inference_mode():
        (detection,) = model.eval()([image])
    assert detection["masks"].shape[1:] == (64, 96)
    assert detection["scores"][0].item() == pytest.approx(scores[0].item(), rel=0.03)
    own = model.train()([image], [truth])
    sum(own.values()).backward()
    for name, loss in losses.items():
        assert own[name].item() == pytest.approx(loss.item(), rel=0.1), name
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("head", ["natural", "bipyramid"])
def test_gradients_reach_the_image(head: str) -> None:
    model = build(head, ["MODEL.BACKBONE.FREEZE_AT", 2]).train()
    images = [(make_image(96, 96, seed) / 255).requires_grad_() for seed in range(2)]
    sum(model(images, [target(96, 96, BOXES), target(96, 96, [])]).values()).backward()
    assert all(image.grad.abs().sum() > 0 for image in images)


def test_the_gradient_of_the_image_is_the_derivative() -> None:
    """Along one direction, against differences, in float64."""
    model = build(opts=FROZEN).double().train()
    truth, direction = target(96, 96, BOXES), torch.randn(3, 96, 96, dtype=torch.float64)

    def loss(image: torch.Tensor) -> torch.Tensor:
        return sum(model([image], [truth]).values())

    image = (make_image(96, 96).double() / 255).requires_grad_()
    (grad,) = torch.autograd.grad(loss(image), image)
    step = 1e-6 * direction
    with torch.no_grad():
        difference = (loss(image + step) - loss(image - step)) / 2e-6
    assert_close((grad * direction).sum(), difference, rtol=1e-4, atol=1e-8)


def test_saliency_of_a_detection() -> None:
    """In eval mode, the score of a detection can be differentiated by the image."""
    model = with_detections(build())
    image = (make_image(64, 96) / 255).requires_grad_()
    (detection,) = model.detect([image])
    (grad,) = torch.autograd.grad(detection["scores"][0], image)
    assert grad.abs().sum() > 0


def test_two_threads() -> None:
    model = with_detections(build())
    images = [make_image(64, 96, seed) for seed in range(2)]
    with torch.inference_mode():
        expected = [model([image])[0] for image in images]
    results: dict[int, dict] = {}

    def detect(number: int) -> None:
        with torch.inference_mode():
            results[number] = model([images[number]])[0]

    threads = [threading.Thread(target=detect, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(expected):
        assert all(torch.equal(results[number][name], value) for name, value in one.items())


def test_state_dict_hooks() -> None:
    model, seen = build(), []
    model.fpn.register_state_dict_post_hook(lambda module, state, prefix, meta: seen.append(prefix))
    model.fpn.register_load_state_dict_pre_hook(lambda module, state, prefix, *a: seen.append("in"))
    model.load_state_dict(model.state_dict())
    assert seen == ["fpn.", "in"]
