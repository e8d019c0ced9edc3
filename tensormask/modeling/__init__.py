"""The model. `TensorMask.build` and `build_model` make it; its parts work without a config."""

from tensormask.modeling.assigners import make_assigner
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.backbone import ResNet, freeze
from tensormask.modeling.box_coder import decode_boxes, encode_boxes
from tensormask.modeling.box_losses import box_ious, box_loss
from tensormask.modeling.build import build_model
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead
from tensormask.modeling.inspect import Inspection
from tensormask.modeling.losses import dice_loss, focal_loss_star, mask_loss
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.quality_losses import quality_focal_loss, varifocal_loss
from tensormask.modeling.tensormask import TensorMask
from tensormask.modeling.windows import Windows

__all__ = [
    "FPN",
    "Assignment",
    "ClassBoxHead",
    "Inspection",
    "MaskHead",
    "ResNet",
    "TensorMask",
    "Windows",
    "assign",
    "box_ious",
    "box_loss",
    "build_model",
    "decode_boxes",
    "dice_loss",
    "encode_boxes",
    "focal_loss_star",
    "freeze",
    "make_assigner",
    "mask_loss",
    "quality_focal_loss",
    "varifocal_loss",
]
