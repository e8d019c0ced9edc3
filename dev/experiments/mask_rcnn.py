"""torchvision's Mask R-CNN with the interface of our model, for small images and random weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

_NORMS = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(32, channels)}
# Channels of FPN, box head and mask head: torchvision's, and those of our quickstart, with a box
# head that is smaller by the same factor.
WIDTHS = {"maskrcnn": (256, 1024, 256), "maskrcnn_narrow": (64, 256, 64)}


class KeepSize(GeneralizedRCNNTransform):
    """Normalize and batch images, of the loader's sizes.

    torchvision's `_skip_resize` is for training only: in inference it resizes to 800 px.
    """

    def resize(self, image: Tensor, target: Any = None) -> Any:
        """Return both as they are."""
        return image, target


class MaskRCNNAdapter(nn.Module):
    """Mask R-CNN with a ResNet-18: images, targets, losses and detections are those of our model.

    All layers train. What is not an argument has torchvision's default: 256 anchors of an image in
    the loss, 2000 proposals in training and 1000 in inference, the layers' initial values.

    Args:
        width: a key of `WIDTHS`.
        norm: of the trunk, "BN" or "GN".
        num_classes: without background.
        anchor_sizes: sides in pixels, for each of p2 to p6, with the aspect ratios 0.5, 1 and 2.
        num_regions: of an image in the losses of the second stage (torchvision's default is 512).
        pixel_mean, pixel_std: per channel, on the scale 0..255.
        score_threshold, num_detections: of an image.
    """

    def __init__(
        self,
        width: str,
        *,
        norm: str,
        num_classes: int,
        anchor_sizes: tuple[tuple[int, ...], ...],
        num_regions: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        score_threshold: float,
        num_detections: int,
    ) -> None:
        super().__init__()
        channels, hidden, mask_channels = WIDTHS[width]
        stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
        trunk = resnet18(norm_layer=_NORMS[norm])
        self.model = MaskRCNN(
            BackboneWithFPN(trunk, stages, [64, 128, 256, 512], channels),
            rpn_anchor_generator=AnchorGenerator(
                anchor_sizes, ((0.5, 1.0, 2.0),) * len(anchor_sizes)
            ),
            box_head=TwoMLPHead(channels * 7 * 7, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
            mask_head=MaskRCNNHeads(channels, (mask_channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
            box_batch_size_per_image=num_regions,
            box_score_thresh=score_threshold,
            box_detections_per_img=num_detections,
        )
        mean, std = ([value / 255 for value in values] for values in (pixel_mean, pixel_std))
        self.model.transform = KeepSize(0, 0, mean, std)

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
    ) -> Any:
        """Return losses in train mode, detections in eval mode, as `TensorMask.forward`."""
        pixels = [image.float() / 255 for image in images]
        if targets is not None:
            return self.model(pixels, [_for_torchvision(target) for target in targets])
        model, sizes = self.model, output_sizes or [tuple(image.shape[1:]) for image in images]
        batch, _ = model.transform(pixels)
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        found, _ = model.roi_heads(features, proposals, batch.image_sizes)
        found = model.transform.postprocess(found, batch.image_sizes, sizes)
        return [
            {
                "boxes": one["boxes"],
                "scores": one["scores"],
                "labels": one["labels"] - 1,
                "masks": one["masks"][:, 0] > 0.5,
            }
            for one in found
        ]


def _for_torchvision(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a target with labels from 1 and uint8 masks."""
    labels, masks = target["labels"] + 1, target["masks"].to(torch.uint8)
    return {"boxes": target["boxes"], "labels": labels, "masks": masks}
