"""The options that make a run need less memory, for messages."""

import torch

from tensormask.config import CfgNode
from tensormask.engine import distributed


def training_advice(cfg: CfgNode) -> str:
    """Return the options that make training need less memory, without those that are used."""
    solver, head = cfg.SOLVER, cfg.MODEL.TENSOR_MASK
    images = solver.IMS_PER_BATCH // distributed.get_world_size()  # of one process
    parts = solver.ACCUMULATE_STEPS
    options = []
    if images > parts:
        more = next(n for n in range(parts + 1, images + 1) if images % n == 0)
        options.append(
            f"SOLVER.ACCUMULATE_STEPS {more} (the same {solver.IMS_PER_BATCH} images of "
            "SOLVER.IMS_PER_BATCH in more parts)"
        )
    if not head.CHECKPOINT_ACTIVATIONS:
        options.append("MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS True")
    if not solver.AMP.ENABLED and _is_on_gpu(cfg):
        options.append("SOLVER.AMP.ENABLED True")
    if images > 1:
        options.append(f"SOLVER.IMS_PER_BATCH below {solver.IMS_PER_BATCH} (with BASE_LR)")
    sizes = ", ".join(map(str, cfg.INPUT.MIN_SIZE_TRAIN))
    options.append(
        f"smaller images (INPUT.MIN_SIZE_TRAIN {sizes}, MAX_SIZE_TRAIN {cfg.INPUT.MAX_SIZE_TRAIN})"
    )
    return _sentence(options, cfg)


def evaluation_advice(cfg: CfgNode) -> str:
    """Return the options that make an evaluation need less memory, without those that are used."""
    test, head = cfg.TEST, cfg.MODEL.TENSOR_MASK
    sizes = (
        f"TEST.AUG.MIN_SIZES up to {max(test.AUG.MIN_SIZES)}, MAX_SIZE {test.AUG.MAX_SIZE}"
        if test.AUG.ENABLED
        else f"INPUT.MIN_SIZE_TEST {cfg.INPUT.MIN_SIZE_TEST}, "
        f"MAX_SIZE_TEST {cfg.INPUT.MAX_SIZE_TEST}"
    )
    options = [
        f"smaller images ({sizes})",
        f"TEST.DETECTIONS_PER_IMAGE below {test.DETECTIONS_PER_IMAGE}",
    ]
    if head.NMS_ON == "masks":
        options.append(f"MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST below {head.TOPK_CANDIDATES_TEST}")
    if not test.AMP.ENABLED and _is_on_gpu(cfg):
        options.append("TEST.AMP.ENABLED True")
    return _sentence(options, cfg)


def _is_on_gpu(cfg: CfgNode) -> bool:
    return cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available()


def _sentence(options: list[str], cfg: CfgNode) -> str:
    if cfg.DATALOADER.NUM_WORKERS > 1:
        options.append(
            f"for the host's memory, DATALOADER.NUM_WORKERS below {cfg.DATALOADER.NUM_WORKERS}"
        )
    return f"These need less: {'; '.join(options)}."
