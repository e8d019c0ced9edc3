"""Valid and invalid inputs of the model: images, targets, configs."""

import numpy as np
import pytest
import torch
from tiny import build, get_cfg, make_image, target
from torch.testing import assert_close

import tensormask
from tensormask.utils.errors import UserError

BOXES = [[20.0, 30.0, 60.0, 70.0], [70.0, 10.0, 90.0, 50.0]]


def test_uint8_and_floating_images_are_equal() -> None:
    model = build().eval()
    image = make_image(33, 40)
    assert_close(model.preprocess([image]), model.preprocess([image.float() / 255]))


def test_masks_of_0_and_255() -> None:
    model = build().train()
    truth = target(96, 96, BOXES)
    scaled = truth | {"masks": truth["masks"].to(torch.uint8) * 255}
    losses = model([make_image(96, 96)], [truth]), model([make_image(96, 96)], [scaled])
    assert_close(losses[0]["loss_mask"], losses[1]["loss_mask"])


def test_floating_masks_are_true_above_one_half() -> None:
    model, image, truth = build().train(), make_image(96, 96), target(96, 96, BOXES)
    expected = model([image], [truth])["loss_mask"]
    soft = truth["masks"] * 0.5 + 0.2  # 0.2 and 0.7
    for masks in (soft, truth["masks"].double()):
        assert_close(model([image], [truth | {"masks": masks}])["loss_mask"], expected)
    empty = truth | {"masks": torch.full((2, 96, 96), 0.1)}
    assert model([image], [empty])["loss_mask"] != expected


def test_a_model_without_masks_needs_none_in_training() -> None:
    model, truth = build(opts=["MODEL.MASK_ON", False]).train(), target(96, 96, BOXES)
    del truth["masks"]
    assert set(model([make_image(96, 96)], [truth])) == {"loss_cls", "loss_box_reg"}


IMAGE, TRUTH = make_image(96, 96), target(96, 96, BOXES)


@pytest.mark.parametrize(
    "training, arguments, message",
    [
        (True, ([], []), "no images"),
        (False, ([],), "no images"),
        (True, ([IMAGE], [TRUTH] * 2), "targets must have one entry per image: got 2 for 1"),
        (True, ([IMAGE] * 2, [TRUTH]), "targets must have one entry per image: got 1 for 2"),
        (False, ([IMAGE] * 2, None, [(9, 9)]), "output_sizes must have one entry per image"),
        (True, ([IMAGE], [None]), "dict with the tensors boxes, labels, masks, got NoneType"),
        (
            True,
            ([IMAGE], [{"boxes": TRUTH["boxes"], "labels": TRUTH["labels"]}]),
            r"boxes, labels, masks, got .'boxes', 'labels'.",
        ),
        (True, ([IMAGE], [TRUTH | {"boxes": BOXES}]), "dict with the tensors"),
    ],
)
def test_bad_lists_are_refused(training, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        build().train(training)(*arguments)


def test_preprocess_by_hand() -> None:
    """BGR, minus mean, over std, then zeros up to the next multiples of 32."""
    opts = ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [1.0, 2.0, 4.0]]
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 33, 5)
    batch = build(opts=opts).preprocess([image])
    assert batch.shape == (1, 3, 64, 32)
    assert batch[0, :, 32, 4].tolist() == [29.0, 9.0, 1.75]  # blue, green, red
    assert batch[0, :, 33:].abs().sum() == batch[0, :, :, 5:].abs().sum() == 0
    rgb = build(opts=[*opts, "INPUT.FORMAT", "RGB"]).preprocess([image])
    assert rgb[0, :, 0, 0].tolist() == [9.0, 9.0, 6.75]


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.full((3, 8, 8), 200.0), "0..1"),
        (torch.zeros(8, 8, 3), "3, H, W"),
        (torch.zeros(3, 0, 8), "3, H, W"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "uint8 or floating"),
        (np.zeros((3, 8, 8), np.uint8), "must be a tensor .*, got ndarray"),
    ],
)
def test_bad_images_are_refused(image, message) -> None:
    with pytest.raises(ValueError, match=message):
        build().eval()([image])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 3])}, "NUM_CLASSES"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0])}, "boxes must be"),
        ({"boxes": torch.tensor([[20.0, 30, 60, 70], [70, 10, 70, 50]])}, "without area"),
        ({"masks": torch.zeros(2, 96, 95, dtype=torch.bool)}, "masks must be"),
        ({"masks": torch.zeros(1, 96, 96, dtype=torch.bool)}, "masks must be"),
    ],
)
def test_bad_targets_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build().train()([make_image(96, 96)], [target(96, 96, BOXES) | change])


def test_targets_are_needed_in_train_mode() -> None:
    with pytest.raises(ValueError, match="targets"):
        build().train()([make_image(64, 64)])


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "tensormask_R_50_FPN_1x"),
        (["MODEL.TENSOR_MASK.ALIGNED_ON", False], "ALIGNED_ON to True, or BIPYRAMID_ON"),
        (["MODEL.TENSOR_MASK.HEAD", "tripyramid"], "auto, simple_natural, .*bipyramid"),
        (
            ["MODEL.TENSOR_MASK.HEAD", "bipyramid", "MODEL.TENSOR_MASK.BIPYRAMID_ON", False],
            "HEAD is 'bipyramid'.* they are True and False: remove the two, or set HEAD to",
        ),
        (["MODEL.TENSOR_MASK.HEAD", "upscale_natural"], "UPSCALE_LAMBDA is 1.0.*1.5, 3 or 5"),
        (
            ["MODEL.TENSOR_MASK.HEAD", "upscale_natural", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 3.0],
            "masks of .11, 15. pixels",
        ),
        (["MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 3.0], "leave UPSCALE_LAMBDA at 1"),
        (["MODEL.TENSOR_MASK.UPSCALE_MODE", "nearest"], "leave UPSCALE_LAMBDA at 1"),
        (["MODEL.TENSOR_MASK.BOX_ON", False], "set NMS_ON to .masks. or BOX_ON to True"),
        (["MODEL.TENSOR_MASK.NMS_ON", "mask"], "'boxes' or 'masks'"),
        (["MODEL.MASK_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"], "no mask head"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[44, 60]]], "6 levels"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]]], "square"),
        (["MODEL.TENSOR_MASK.IN_FEATURES", ["p2", "p4"]], "consecutive"),
        (["MODEL.RESNETS.DEPTH", 20], "10, 18, 34, 50, 101"),
        (["MODEL.RESNETS.NORM", "IN"], "FrozenBN"),
        (["MODEL.FPN.FUSE_TYPE", "max"], "fuse"),
        (["MODEL.TENSOR_MASK.INIT", "xavier"], "normal"),
        (["MODEL.DEVICE", "cuda"], "no GPU"),
        (["INPUT.FORMAT", "L"], "RGB"),
        (["MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 1.0], "score_threshold"),
        (["MODEL.TENSOR_MASK.IN_FEATURES", []], "consecutive"),
        (["MODEL.FPN.IN_FEATURES", ["res3"]], "MODEL.FPN.IN_FEATURES must be"),
        (["MODEL.RESNETS.OUT_FEATURES", ["res3"]], "MODEL.RESNETS.OUT_FEATURES must be"),
        (
            ["MODEL.BACKBONE.TRUNK", "mobilenet_v2", "MODEL.RESNETS.OUT_FEATURES", ["res2"]],
            "with MODEL.BACKBONE.TRUNK",
        ),
        (["MODEL.BACKBONE.TRUNK", "mobilenet_v2", "MODEL.BACKBONE.FREEZE_AT", 6], "0..5, got 6"),
        (["MODEL.COMPILE", "fast"], "default, reduce-overhead, max-autotune"),
        (["MODEL.SIZE_DIVISOR", 48], "multiple of 32"),
        (["TEST.AMP.DTYPE", "float32"], r"TEST\.AMP\.DTYPE must be 'bfloat16' or 'float16'"),
    ],
)
def test_configs_that_cannot_be_built(opts, message) -> None:
    if message == "no GPU" and torch.cuda.is_available():
        pytest.skip("a GPU is available")
    with pytest.raises(ValueError, match=message):
        tensormask.build_model(get_cfg(opts=opts))


def test_initial_weights_of_the_heads() -> None:
    for name, weight in build().head.named_parameters():
        if name.endswith("weight"):  # "he" in the towers, of 16 channels
            std = (2 / (16 * 9)) ** 0.5 if "subnet" in name else 0.01
            assert weight.std().item() == pytest.approx(std, rel=0.1), name


def test_parts_work_without_a_config() -> None:
    from tensormask.modeling.backbone import ResNet
    from tensormask.modeling.fpn import FPN
    from tensormask.modeling.head import ClassBoxHead
    from tensormask.modeling.mask_head import MaskHead
    from tensormask.modeling.windows import Windows

    windows = Windows((4, 8, 16, 32), tuple((44 * 2**k, 60 * 2**k) for k in range(4)))
    backbone = ResNet(18, norm="BN", freeze_at=0)
    model = tensormask.TensorMask(
        backbone,
        FPN(backbone.out_channels, 32, levels=(2, 5)),
        ClassBoxHead(32, windows.num_sizes, 7, cls_channels=32, bbox_channels=32),
        MaskHead(32, windows.mask_sizes, windows.strides, channels=32),
        windows,
        num_classes=7,
    )
    assert model.eval()([make_image(64, 96)])[0]["masks"].shape[1:] == (64, 96)
