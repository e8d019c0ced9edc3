"""NaN and infinity are detected, and the error names their origin."""

import pytest
import tiny
import torch
from torch import nn

from tensormask.engine.anomaly import NonFiniteError, check_losses, check_weights, watch_modules

BOX = [[4.0, 4.0, 40.0, 40.0]]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def watched(opts=()):
    model = tiny.build("bipyramid", opts)
    watch_modules(model)
    return model


def losses_of(model, image=None):
    image = tiny.make_image(64, 64) if image is None else image
    return model([image], [tiny.target(64, 64, BOX)])


def test_hooks_do_not_change_the_losses():
    expected = losses_of(tiny.build("bipyramid"))
    losses = losses_of(watched())
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
    sum(losses.values()).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image(value):
    image = torch.zeros(3, 64, 64)
    image[1, 5, 7] = value
    model, targets = nn.Identity(), [tiny.target(64, 64, BOX)]
    watch_modules(model)
    for args, kwargs in ((([image], targets), {}), ((), {"images": [image], "targets": targets})):
        with pytest.raises(NonFiniteError, match="Image 0 of the batch is not finite"):
            model(*args, **kwargs)


def test_a_weight():
    model = watched()
    model.fpn.p7.weight.data[0, 0, 0, 0] = float("nan")
    name = next(name for name, p in model.named_parameters() if not p.isfinite().all())
    with pytest.raises(NonFiniteError, match=f"The weight {name} is not finite before"):
        losses_of(model)


def test_the_output_of_a_module():
    model = watched()
    # Finite weights with infinite products.
    for conv in (model.backbone.res4[0].conv1, model.backbone.res3[0].conv1):
        conv.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"output of backbone\.res3\.0\.conv1 \(Conv2d, \d+"):
        losses_of(model)


class Root(nn.Module):
    """A module with an infinite gradient at 0, where its value is finite."""

    def forward(self, x):
        return x.sqrt()


def test_the_gradient_by_the_output_of_a_module():
    layers = nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2), Root(), nn.Linear(2, 1)
    model = nn.Sequential(*layers)
    model[2].weight.data.zero_()
    model[2].bias.data.zero_()
    model(torch.ones(1, 2)).sum().backward()
    assert not model[2].bias.grad.isfinite().all()
    watch_modules(model)
    with pytest.raises(NonFiniteError, match=r"output of 2 \(2 of 2.*origin is in"):
        model(torch.ones(1, 2)).sum().backward()


def test_losses_that_are_not_finite():
    check_losses({"loss_a": 1.5, "loss_b": 2.0}, 0, [])
    losses = {"loss_a": 1.5, "loss_b": float("inf")}
    batch = [{"file_name": "a.png"}]
    with pytest.raises(NonFiniteError, match=r"iteration 7: loss_a 1\.5, loss_b inf.*a\.png.*DET"):
        check_losses(losses, 7, batch)


def test_weights_that_are_not_finite():
    model = nn.Linear(2, 2)
    check_weights(model, "x.pth")
    model.bias.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"Not finite in x\.pth: bias; use other weights"):
        check_weights(model, "x.pth")
