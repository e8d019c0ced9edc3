"""All config options with default, unit and meaning.

Names and defaults equal detectron2's if it has the key, except ``MODEL.DEVICE``. ``config.node``
merges files and ``KEY VALUE`` pairs into the tree.
"""

from __future__ import annotations

from typing import Any

from tensormask.config.node import CfgNode

_DEFAULTS: dict[str, Any] = {
    # Version of the key names; only detectron2's current version, 2, is supported.
    "VERSION": 2,
    "MODEL": {
        # "auto" (the GPU if one is available, else the CPU), "cpu", "cuda", "cuda:1", ...
        "DEVICE": "auto",
        # Set it to "TensorMask" to build a model; the default is detectron2's, its Mask R-CNN.
        "META_ARCHITECTURE": "GeneralizedRCNN",
        # Path, URL or model zoo name of the weights to start from or to evaluate; "" for none.
        "WEIGHTS": "",
        # Images are padded to multiples of this number of pixels: 32 (detectron2's) or a multiple
        # of it. A larger one gives fewer input sizes to compile for.
        "SIZE_DIVISOR": 32,
        # Use the channels_last memory format (N, H, W, C): True, False, or "auto", which is True on
        # a GPU with tensor cores (compute capability 7.0 or newer) and False elsewhere.
        "CHANNELS_LAST": "auto",
        # Compile backbone, feature pyramid, class and box head, once for each input size: "" (no),
        # or torch.compile's mode, "default", "reduce-overhead" (CUDA graphs) or "max-autotune".
        "COMPILE": "",
        # Predict masks; if False, only classes and boxes.
        "MASK_ON": False,
        # Mean and standard deviation that normalize each channel: on the 0..255 scale, in the
        # channel order of INPUT.FORMAT.
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {
            # "" for a ResNet of RESNETS.DEPTH; or a backbone of torchvision, such as
            # "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_large" or "convnext_tiny"; or "timm/"
            # and a name of timm.
            "TRUNK": "",
            # Number of stages that are not trained: 0 none, 1 the stem, 2 the stem and res2, ...,
            # 5 all.
            "FREEZE_AT": 2,
        },
        "RESNETS": {
            # Number of layers: 10, 18, 34, 50 or 101.
            "DEPTH": 50,
            # Normalization: "FrozenBN" (constant), "BN", "SyncBN" (over all processes) or "GN" (32
            # groups).
            "NORM": "FrozenBN",
            # Put the stride of a block in its first 1x1 convolution (MSRA weights); if False, in
            # the 3x3 convolution (torchvision's weights).
            "STRIDE_IN_1X1": True,
            # Stages that are outputs, "res2" to "res5" of strides 4 to 32, or the first of them:
            # the others are not built. FPN.IN_FEATURES are the same.
            "OUT_FEATURES": ["res4"],
        },
        "FPN": {
            # Input stages of the pyramid, from fine to coarse.
            "IN_FEATURES": [],
            # Number of channels of each pyramid level.
            "OUT_CHANNELS": 256,
            # Normalization: "" (none), "GN", "BN", "SyncBN" or "LN" (over the channels of each
            # location).
            "NORM": "",
            # How a coarser level is merged into the next finer one: "sum" or "avg".
            "FUSE_TYPE": "sum",
        },
        "ANCHOR_GENERATOR": {
            # Side of the square windows in pixels of the network's input: a list per level.
            "SIZES": [[32, 64, 128, 256, 512]],
            # Height / width of the windows; TensorMask needs square ones, [[1.0]].
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "TENSOR_MASK": {
            # Pyramid levels with windows, from fine to coarse; p2 has stride 4.
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6", "p7"],
            # Number of 3x3 convolutions in each of the three towers, and of their channels.
            "NUM_CONVS": 4,
            "CLS_CHANNELS": 256,
            "BBOX_CHANNELS": 128,
            "MASK_CHANNELS": 128,
            # Normalization of the towers: "" (none), "LN" (over the channels of each location),
            # "BN" (statistics per feature level) or "GN" (32 groups or fewer).
            "NORM": "",
            # Number of object classes, without background.
            "NUM_CLASSES": 80,
            # Candidates need a score above this.
            "SCORE_THRESH_TEST": 0.05,
            # Number of best (window, class) pairs of an image, over all levels, that enter NMS.
            "TOPK_CANDIDATES_TEST": 6000,
            # NMS removes the lower-scored of two boxes of a class whose IoU is above this.
            "NMS_THRESH_TEST": 0.5,
            # Factors of the box deltas (dx, dy, dw, dh).
            "BBOX_REG_WEIGHTS": (1.5, 1.5, 0.75, 0.75),
            # Loss of the classes: "focal_star" (FL*), or "quality" or "varifocal", whose targets
            # are the IoUs of the predicted boxes.
            "CLS_LOSS": "focal_star",
            # Focusing exponent, and weight of the positives, in the classification loss FL*.
            "FOCAL_LOSS_GAMMA": 3.0,
            "FOCAL_LOSS_ALPHA": 0.3,
            # Which windows are positive for an object, of those that contain it and are not much
            # larger: "paper", those near its center, unless several objects claim one; "nearest",
            # the same, but the nearest of several objects wins; "atss", the nearest ones of all
            # levels and sizes.
            "ASSIGNMENT": "paper",
            # How near: the distance of the centers, in strides of the level.
            "ASSIGN_RADIUS": 1.0,
            # The largest number of positive windows of an object, for "atss".
            "ASSIGN_TOPK": 9,
            # Factor of the mask loss, and of its foreground pixels.
            "MASK_LOSS_WEIGHT": 2.0,
            "POSITIVE_WEIGHT": 1.5,
            # Factor of a Dice loss of the masks beside it, loss_dice; none if 0.
            "DICE_LOSS_WEIGHT": 0.0,
            # Predict the IoU of each window's mask by the box head, which rescales scores in
            # inference; and the factor of its loss.
            "MASK_IOU_ON": False,
            "MASK_IOU_LOSS_WEIGHT": 1.0,
            # Factor of the box loss. Where gradients are clipped, a larger one makes the other
            # losses smaller.
            "BBOX_REG_LOSS_WEIGHT": 1.0,
            # Mask head: "simple_natural", "simple_aligned", "upscale_natural", "upscale_aligned",
            # "bipyramid", or "auto", the head of detectron2's two switches below. A file or command
            # line that sets a head also sets the switches, and one that sets a switch sets this to
            # "auto": the last one counts.
            "HEAD": "auto",
            # detectron2's switches: aligned representation, and tensor bipyramid.
            "ALIGNED_ON": False,
            "BIPYRAMID_ON": False,
            # How many times coarser an upscale head predicts its masks, such as 1.5, 3 or 5, and
            # how it upscales them, "bilinear" or "nearest". Other heads need these defaults.
            "UPSCALE_LAMBDA": 1.0,
            "UPSCALE_MODE": "bilinear",
            # Side of a mask pixel of the bipyramid in pixels, a divisor of the finest stride, such
            # as 2 or 1 for finer masks than the paper's; 0 for the finest stride.
            "MASK_UNIT": 0,
            # Regress boxes; if False, a detection has the bounding box of its mask.
            "BOX_ON": True,
            # Boxes that NMS compares: the regressed "boxes", or those of the "masks", which needs
            # the masks of all candidates.
            "NMS_ON": "boxes",
            # Let a coarse level say where the finest one is computed in inference: a query predicts
            # which of its locations have positive windows.
            "QUERY_ON": False,
            # Levels whose class towers the query reads: ["p3"], or ["p3", "p4"].
            "QUERY_LEVELS": ["p3"],
            # Scores of the query must be above this; 0 for all locations, and -1 for the threshold
            # in the checkpoint, which `tensormask analyze --query` chooses.
            "QUERY_THRESH": -1.0,
            # Share of the finest level's blocks of background (128 px wide) whose class loss is
            # computed in a training step, beside what the query asks for; 0 for all of them.
            "QUERY_SAMPLE": 0.0,
            # Initialization of the towers: "normal" (std 0.01, detectron2's) or "he" (for towers of
            # few channels).
            "INIT": "normal",
            # Recompute the activations of the heads in the backward pass: less memory, more time.
            "CHECKPOINT_ACTIVATIONS": False,
        },
    },
    "INPUT": {
        # Shorter side in training, in pixels: one of these values ("choice"), or uniform from the
        # first to the second ("range").
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        # Upper limit of the longer side in training, in pixels; it makes the image smaller.
        "MAX_SIZE_TRAIN": 1333,
        # The same in evaluation; a MIN_SIZE_TEST of 0 keeps the images' sizes.
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        # Flip of a random half of the training images: "horizontal", "vertical", "both" (one half
        # each, independently) or "none".
        "RANDOM_FLIP": "horizontal",
        # Rotate training images by 0, 90, 180 or 270 degrees with equal probability.
        "ROTATE_90": False,
        # (Lowest, highest) factor of a random size of training images, instead of MIN_SIZE_TRAIN
        # and MAX_SIZE_TRAIN: an image just fits into SCALE_JITTER_SIZE times the factor; () for no
        # jitter. Large-scale jitter is (0.1, 2.0).
        "SCALE_JITTER": (),
        # (Height, width) in pixels of the random part of the jittered image that is trained on;
        # the image is padded if it is smaller.
        "SCALE_JITTER_SIZE": (1024, 1024),
        "CROP": {
            # Crop training images at random before they are resized.
            "ENABLED": False,
            # Meaning of SIZE: "relative_range" (lowest shares of height and width), "relative"
            # (shares), "absolute" (pixels) or "absolute_range" (lowest and highest pixels).
            "TYPE": "relative_range",
            "SIZE": [0.9, 0.9],
        },
        # Probability that a training image is made up to 4 times smaller, at random within a padded
        # canvas of its size.
        "ZOOM_OUT": 0.0,
        # Probability of each change of brightness, contrast, saturation and hue in training.
        "PHOTOMETRIC": 0.0,
        # Probability that objects of another training image are pasted into a training image.
        "COPY_PASTE": 0.0,
        # Channel order of the network's input: "BGR" (MSRA weights) or "RGB".
        "FORMAT": "BGR",
        # detectron2's "polygon" or "bitmask"; both are read as bitmaps here.
        "MASK_FORMAT": "polygon",
    },
    "DATASETS": {
        # Names of data sets: registered ones, coco_2017_train, shapes_train,
        # annotations.json@images, data.yaml of YOLO, ...
        "TRAIN": (),
        "TEST": (),
        # Make an issue of a data set (data/checks/issues.py) an error. If False, issues are counted
        # in the log and in metrics.json, and the entries are left out or corrected.
        "STRICT": False,
        # How the classes of weights and data sets are matched: by their "name", or by their
        # "position" in the order of category ids. Weights without names are matched by position.
        "MATCH_CLASSES": "name",
    },
    "DATALOADER": {
        # Number of worker processes that read images; 0 reads them in the training process.
        "NUM_WORKERS": 4,
        # Seconds without a batch from the worker processes until the run ends with an error; 0
        # waits for ever. A warning is logged after 60 s.
        "TIMEOUT": 600,
        # Do not mix wide and high images in a batch, which saves padding.
        "ASPECT_RATIO_GROUPING": True,
        # Train only on images with objects.
        "FILTER_EMPTY_ANNOTATIONS": True,
        # How often an epoch shows an image: "TrainingSampler" (once), or
        # "RepeatFactorTrainingSampler" (more often if it has a class that fewer than
        # REPEAT_THRESHOLD of the images have, such as 0.001: by the square root of the ratio, or by
        # the ratio itself).
        "SAMPLER_TRAIN": "TrainingSampler",
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    },
    "SOLVER": {
        # Optimizer: "SGD" or "AdamW".
        "OPTIMIZER": "SGD",
        # Schedule: "WarmupMultiStepLR" (STEPS, GAMMA) or "WarmupCosineLR" (to BASE_LR_END).
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        # Total number of iterations, and of images in each, over all processes.
        "MAX_ITER": 40000,
        "IMS_PER_BATCH": 16,
        # Number of processes that this config is written for. With n times as many, IMS_PER_BATCH
        # and BASE_LR are multiplied by n, and MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and
        # TEST.EVAL_PERIOD are divided by n. 0 changes nothing.
        "REFERENCE_WORLD_SIZE": 0,
        # Number of parts of a batch that are processed one after the other, which saves memory. The
        # gradient is the average over the parts.
        "ACCUMULATE_STEPS": 1,
        # The dtype in which several processes exchange gradients: "" (that of the weights), or
        # "bfloat16", for slow networks: half of the bytes, gradients rounded to 8 bits.
        "REDUCE_DTYPE": "",
        "AMP": {
            # Mixed precision in training: forward pass and losses in half precision, weights and
            # their updates in float32.
            "ENABLED": False,
            # "float16" (with dynamic loss scaling) or "bfloat16" (without; for CPUs, and GPUs since
            # Ampere).
            "DTYPE": "float16",
        },
        "EMA": {
            # Exponential moving average of the weights, evaluated and saved in addition to them.
            "ENABLED": False,
            # Decay: the share of the old average in an update.
            "DECAY": 0.9998,
            # Let the decay increase from 0.1 to DECAY: at most (1 + n) / (10 + n) in update n, so
            # that the averages of a short run are not those of its beginning.
            "WARMUP": False,
        },
        # Check all tensors to find the module that first returns NaN or infinity. Slow: use it to
        # repeat a run that has stopped.
        "DETECT_ANOMALY": False,
        # Learning rate after the warm-up, and at the end of a cosine schedule.
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        # Momentum of SGD, and whether it is Nesterov's.
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        # Weight decay of weights, of normalization parameters, and of biases (None: as weights).
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_BIAS": None,
        # Factor of the learning rate of biases.
        "BIAS_LR_FACTOR": 1.0,
        # The learning rate is multiplied by GAMMA at each of these iterations.
        "GAMMA": 0.1,
        "STEPS": (30000,),
        # Warm-up: first factor of the learning rate, iterations until the factor is 1, and its
        # form, "linear" or "constant".
        "WARMUP_FACTOR": 0.001,
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",
        # Length of the warm-up as a share of MAX_ITER, from 0 to below 1, such as 0.03: it replaces
        # WARMUP_ITERS. 0 for WARMUP_ITERS.
        "WARMUP_SHARE": 0.0,
        # Number of iterations between checkpoints.
        "CHECKPOINT_PERIOD": 5000,
        # Number of last checkpoints that are kept; 0 for all.
        "CHECKPOINT_MAX_TO_KEEP": 0,
        # Metric that selects the weights in model_best.pth among the evaluations of a run, such as
        # "segm/AP" ("ema/segm/AP" for averaged weights); "" for no such file.
        "CHECKPOINT_BEST": "",
        # Stop the run when the metric of CHECKPOINT_BEST has not improved in this number of
        # evaluations in a row (TEST.EVAL_PERIOD); 0 never stops it.
        "PATIENCE": 0,
        "CLIP_GRADIENTS": {
            # Clip the gradients before each step.
            "ENABLED": False,
            # "value" (of each element), "norm" (of each parameter) or "full_model" (norm of all).
            "CLIP_TYPE": "value",
            # The largest value or norm.
            "CLIP_VALUE": 1.0,
            # The p of the p-norm; .inf for the largest element.
            "NORM_TYPE": 2.0,
        },
    },
    "TEST": {
        # Rows [task, metric, value, tolerance] in percent, such as ["segm", "AP", 35.8, 0.3]: a run
        # fails if its last evaluation is outside. Needs exactly one set in DATASETS.TEST.
        "EXPECTED_RESULTS": [],
        # Number of iterations between evaluations; 0 evaluates only at the end.
        "EVAL_PERIOD": 0,
        "AMP": {
            # Mixed precision in inference, and its half-precision type: "bfloat16" or "float16".
            "ENABLED": False,
            "DTYPE": "bfloat16",
        },
        "AUG": {
            # Test-time augmentation: detect in several sizes of each image, and merge. The sizes
            # are made from the image at MIN_SIZE_TEST, or from the original one if that is 0.
            "ENABLED": False,
            # Shorter sides in pixels, and the upper limit of the longer side.
            "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
            "MAX_SIZE": 4000,
            # Detect in the flip of each of them, too, left to right.
            "FLIP": True,
        },
        # Let NMS compare boxes of different classes, too: an object gets the best of its classes.
        "CLASS_AGNOSTIC_NMS": False,
        # Maximum number of detections of an image.
        "DETECTIONS_PER_IMAGE": 100,
        # Maximum number of detections of an image that AP counts; above 100, AP at 100 is reported
        # as well.
        "MAX_DETS": 100,
        # What matches detections with objects: "pycocotools", or "faster_coco_eval", with the same
        # numbers in less time (pip install 'tensormask[fast-eval]').
        "EVALUATOR": "pycocotools",
        # Also report boundary AP, which takes the IoU of boundaries where that is less than the IoU
        # of masks: it shows how exact the outlines of large objects are. Needs faster_coco_eval.
        "BOUNDARY_AP": False,
        # Number of images that an evaluation draws next to their ground truth.
        "NUM_VISUALIZED": 8,
        # Also report the oracle: the AP of ground-truth masks after assignment, crop and paste.
        "ORACLE_ON": False,
    },
    # Folder for config, log, metrics, checkpoints and results of the run.
    "OUTPUT_DIR": "./output",
    # Seed of all random numbers; a negative one is replaced by a random seed.
    "SEED": -1,
    # Let cuDNN time its algorithms for each new input size.
    "CUDNN_BENCHMARK": False,
    # Make runs on a GPU bit-identical, with slower algorithms; an operation without a deterministic
    # one is an error. Runs on a CPU are always deterministic.
    "DETERMINISTIC": False,
    # Precision of float32 products: "highest" (float32), "high" (TF32 on GPUs), "medium" (also
    # bfloat16), or "" for PyTorch's default, TF32 in convolutions only.
    "FLOAT32_PRECISION": "",
}


def get_cfg() -> CfgNode:
    """Return a new tree with every option at its default.

    Example:
        >>> get_cfg().MODEL.TENSOR_MASK.NUM_CLASSES
        80
    """
    return CfgNode(_DEFAULTS)
