"""Every option: its default, unit and meaning.

Names and defaults are detectron2's where it has the key, but for ``MODEL.DEVICE``. How files and
``KEY VALUE`` pairs change the tree, and what becomes of detectron2's other keys, is in
``config_node.py``.
"""

from __future__ import annotations

from typing import Any

from tensormask.config.node import CfgNode

_DEFAULTS: dict[str, Any] = {
    # Generation of the key names. detectron2's current one; no other is read.
    "VERSION": 2,
    "MODEL": {
        # "auto" (the GPU where there is one, else the CPU), "cpu", "cuda", "cuda:1", ...
        "DEVICE": "auto",
        # Must be "TensorMask" to build a model; detectron2's default names its Mask R-CNN.
        "META_ARCHITECTURE": "GeneralizedRCNN",
        # Path of the weights to start from or to evaluate; "" for none.
        "WEIGHTS": "",
        # Images are padded to multiples of this, in pixels: 32 (detectron2's), or a multiple of
        # it, which makes fewer input sizes to compile for.
        "SIZE_DIVISOR": 32,
        # Lay tensors out as (N, H, W, C), which tensor cores work in.
        "CHANNELS_LAST": False,
        # Compile backbone, pyramid, class and box head, anew for each input size: "" (no), or
        # torch.compile's mode, "default", "reduce-overhead" (CUDA graphs) or "max-autotune".
        "COMPILE": "",
        # Whether to predict masks; off leaves classes and boxes.
        "MASK_ON": False,
        # Each channel loses its mean, then is divided by its std. On the 0..255 scale, in the
        # channel order of INPUT.FORMAT.
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {
            # Stages that are not trained: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
            "FREEZE_AT": 2,
        },
        "RESNETS": {
            # Layers: 18, 34, 50 or 101.
            "DEPTH": 50,
            # "FrozenBN" (constants), "BN", "SyncBN" (over processes) or "GN" (32 groups).
            "NORM": "FrozenBN",
            # Where a block has its stride 2: in the first 1x1 convolution (MSRA weights), or, when
            # off, in the 3x3 (torchvision's weights).
            "STRIDE_IN_1X1": True,
            # Stages whose output is kept: "res2" .. "res5", strides 4 .. 32.
            "OUT_FEATURES": ["res4"],
        },
        "FPN": {
            # Stages that the pyramid is built on, fine to coarse.
            "IN_FEATURES": [],
            # Channels of each pyramid level.
            "OUT_CHANNELS": 256,
            # "" (none) or "GN".
            "NORM": "",
            # How the coarser level joins the finer one: "sum" or "avg".
            "FUSE_TYPE": "sum",
        },
        "ANCHOR_GENERATOR": {
            # Side of the square windows in pixels of the network's input: a list for each level.
            "SIZES": [[32, 64, 128, 256, 512]],
            # Height / width of the windows. TensorMask's are square: [[1.0]].
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "TENSOR_MASK": {
            # Pyramid levels that carry windows, fine to coarse; p2 has stride 4.
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6", "p7"],
            # 3x3 convolutions in each of the three towers, and their channels.
            "NUM_CONVS": 4,
            "CLS_CHANNELS": 256,
            "BBOX_CHANNELS": 128,
            "MASK_CHANNELS": 128,
            # Classes of objects; the background is none of them.
            "NUM_CLASSES": 80,
            # Scores at or below this are no candidates.
            "SCORE_THRESH_TEST": 0.05,
            # Best (window, class) pairs of an image, over all levels, that reach NMS.
            "TOPK_CANDIDATES_TEST": 6000,
            # Intersection over union above which NMS removes the lower of two boxes of a class.
            "NMS_THRESH_TEST": 0.5,
            # Factors on the box deltas (dx, dy, dw, dh).
            "BBOX_REG_WEIGHTS": (1.5, 1.5, 0.75, 0.75),
            # Steepness, and weight of the positives, in the class loss FL*.
            "FOCAL_LOSS_GAMMA": 3.0,
            "FOCAL_LOSS_ALPHA": 0.3,
            # Factor on the mask loss, and on the pixels of it that are foreground.
            "MASK_LOSS_WEIGHT": 2.0,
            "POSITIVE_WEIGHT": 1.5,
            # The mask head: "simple_natural", "simple_aligned", "upscale_natural",
            # "upscale_aligned", "bipyramid", or "auto": what detectron2's two switches below say.
            # A file or command line that names a head also sets the switches, and one that names a
            # switch sets this to "auto": what is said last counts.
            "HEAD": "auto",
            # detectron2's: masks in the aligned representation, and on the tensor bipyramid.
            "ALIGNED_ON": False,
            "BIPYRAMID_ON": False,
            # How many times coarser an upscale head predicts its masks, such as 1.5, 3 or 5, and
            # how it makes them finer, "bilinear" or "nearest". Other heads leave both as they are.
            "UPSCALE_LAMBDA": 1.0,
            "UPSCALE_MODE": "bilinear",
            # Whether boxes are regressed; off, a detection has the box of its mask.
            "BOX_ON": True,
            # The boxes that NMS compares: the regressed "boxes", or those of the "masks", for which
            # the masks of all candidates are made.
            "NMS_ON": "boxes",
            # Start of the towers: "normal" (std 0.01, detectron2's) or "he" (for narrow towers).
            "INIT": "normal",
            # Keep no activations of the heads for the backward pass: less memory, and their forward
            # pass once more.
            "CHECKPOINT_ACTIVATIONS": False,
        },
    },
    "INPUT": {
        # Shorter side in training, in pixels: one of these ("choice"), or uniform from the first to
        # the second ("range").
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        # The image shrinks further where its longer side would pass this, in pixels.
        "MAX_SIZE_TRAIN": 1333,
        # The same in evaluation; 0 leaves images at their size.
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        # Flip half of the training images: "horizontal", "vertical" or "none".
        "RANDOM_FLIP": "horizontal",
        # Channel order that the network is fed: "BGR" (MSRA weights) or "RGB".
        "FORMAT": "BGR",
        # detectron2's "polygon" or "bitmask"; both end in bitmaps here.
        "MASK_FORMAT": "polygon",
    },
    "DATASETS": {
        # Names: registered ones, coco_2017_train, shapes_train, annotations.json@images, ...
        "TRAIN": (),
        "TEST": (),
        # Whether an issue in a set (data/checks/issues.py) is an error; off, what has one is
        # left out, and issues are counted in the log and in metrics.json.
        "STRICT": False,
    },
    "DATALOADER": {
        # Processes that read images; 0 reads them in the training process.
        "NUM_WORKERS": 4,
        # Batches hold upright or lying images only, which saves padding.
        "ASPECT_RATIO_GROUPING": True,
        # Leave images without objects out of training.
        "FILTER_EMPTY_ANNOTATIONS": True,
    },
    "SOLVER": {
        # "SGD" or "AdamW".
        "OPTIMIZER": "SGD",
        # "WarmupMultiStepLR" (STEPS, GAMMA) or "WarmupCosineLR" (down to BASE_LR_END).
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        # Optimiser steps in all, and images in each, over all processes.
        "MAX_ITER": 40000,
        "IMS_PER_BATCH": 16,
        # Processes that this config is meant for: with another number of them, IMS_PER_BATCH and
        # BASE_LR are multiplied, MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and
        # TEST.EVAL_PERIOD divided, by how many times more there are. 0: everything as written.
        "REFERENCE_WORLD_SIZE": 0,
        # Parts that each batch goes through the model in, one after the other: less memory. The
        # gradient is the average of theirs.
        "ACCUMULATE_STEPS": 1,
        "AMP": {
            # Half precision in forward pass and losses; weights and their updates stay float32.
            "ENABLED": False,
            # "float16" (with a loss scale that adapts itself), or "bfloat16" (needs none; GPUs from
            # Ampere on, and CPUs).
            "DTYPE": "float16",
        },
        "EMA": {
            # Keep moving averages of the weights, evaluated and saved beside them.
            "ENABLED": False,
            # The share of the averages that a step leaves, in place of the new weights.
            "DECAY": 0.9998,
        },
        # Find the module where NaN or infinity arises, by a look at every tensor: for a repeat of
        # a run that stopped, as it is slow.
        "DETECT_ANOMALY": False,
        # Learning rate after the warm-up, and at the end of a cosine.
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        # SGD's.
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        # Weight decay: of weights, of normalisation parameters, and of biases (None: as weights).
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_BIAS": None,
        # Factor on the learning rate of biases.
        "BIAS_LR_FACTOR": 1.0,
        # The learning rate is multiplied by GAMMA at each of these iterations.
        "GAMMA": 0.1,
        "STEPS": (30000,),
        # First factor on the learning rate, iterations until it is 1, and "linear" or "constant".
        "WARMUP_FACTOR": 0.001,
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",
        # Iterations between checkpoints.
        "CHECKPOINT_PERIOD": 5000,
        # How many of them stay, the last ones; 0 for all.
        "CHECKPOINT_MAX_TO_KEEP": 0,
        # Metric of metrics.json, such as "segm/AP" (of averaged weights "ema/segm/AP"): the weights
        # that are best by it in the evaluations of a run stay as model_best.pth; "" for none.
        "CHECKPOINT_BEST": "",
        "CLIP_GRADIENTS": {
            # Bound the gradients before each step.
            "ENABLED": False,
            # "value" (each element), "norm" (each parameter) or "full_model" (all as one vector).
            "CLIP_TYPE": "value",
            # The largest value or norm.
            "CLIP_VALUE": 1.0,
            # p of the norm; .inf for the largest element.
            "NORM_TYPE": 2.0,
        },
    },
    "TEST": {
        # Rows [task, metric, value, tolerance], such as ["segm", "AP", 35.8, 0.3]: a run whose last
        # evaluation lies outside fails. In percent; for one set in DATASETS.TEST.
        "EXPECTED_RESULTS": [],
        # Iterations between evaluations; 0 evaluates at the end only.
        "EVAL_PERIOD": 0,
        "AMP": {
            # Detect in half precision, and in which: "bfloat16" or "float16".
            "ENABLED": False,
            "DTYPE": "bfloat16",
        },
        # Most detections that an image gets.
        "DETECTIONS_PER_IMAGE": 100,
        # Most detections of an image that the AP counts; above 100, AP at 100 is printed too.
        "MAX_DETS": 100,
        # Images that an evaluation draws beside their ground truth.
        "NUM_VISUALIZED": 8,
        # Print what true masks score through assignment, crop and paste, beside the model's AP.
        "ORACLE_ON": False,
    },
    # Folder of the run: config, log, metrics, checkpoints, results.
    "OUTPUT_DIR": "./output",
    # Governs all randomness; negative draws one.
    "SEED": -1,
    # Let cuDNN try its algorithms on each new input size.
    "CUDNN_BENCHMARK": False,
    # Same bits in each run on a GPU too, at the cost of slower algorithms; what has none that is
    # deterministic is an error. On the CPU that is so anyway.
    "DETERMINISTIC": False,
    # Products of float32: "highest" (float32), "high" (TF32 on a GPU), "medium" (bfloat16's too),
    # or "" for PyTorch's default, TF32 in convolutions only.
    "FLOAT32_PRECISION": "",
}


def get_cfg() -> CfgNode:
    """A fresh tree with every option at its default."""
    return CfgNode(_DEFAULTS)
