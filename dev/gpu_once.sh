#!/usr/bin/env bash
# Measure everything in a few minutes of an H100. Written without a GPU: all steps ran with DEVICE=cpu only.
#
#   bash dev/gpu_once.sh prepare   beforehand, with network, in the repository's root: makes .gpu/ (wheels, nuclei) and tensormask/_C.abi3.so
#   bash dev/gpu_once.sh 1         on the GPU: correctness of everything (three processes side by side), then all times, one at a time
#   bash dev/gpu_once.sh 2         on the GPU, right after 1: compiled models, the project's own tables, ncu, determinism
#
# Expected: part 1 about 300 s (at most 500), part 2 about 170 s.
# Each step has its own time limit and writes into $OUT immediately, so that results survive a kill.
# Files of 1 (8): log.txt env.json tests.txt model.json learn.txt kernels.json op.json models.json
# Files of 2 (7): log.txt compile.json inference.json train.json ncu.txt det.json learn.txt
set -uo pipefail
PART=${1:-1}
export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=ERROR
PY=${PY:-python3}
WORK=${WORK:-/tmp/gpu_once}
mkdir -p "$WORK"

if [ "$PART" = prepare ]; then
    set -e
    mkdir -p .gpu/whl
    pip312() { "${PY312:-python3.12}" -m pip "$@"; }
    rm -f .gpu/whl/*
    # Packages that the machine lacks. fvcore and iopath have no wheels: they are built here.
    pip312 download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d .gpu/whl pycocotools==2.0.11 yacs==0.1.8 pooch==1.9.0 termcolor==3.3.0 platformdirs
    pip312 wheel -q --no-deps -w .gpu/whl fvcore==0.1.5.post20221221 iopath==0.1.10
    [ -d .gpu/nuclei ] || cp -r "${NUCLEI:-../shared/data/nuclei_dsb2018}" .gpu/nuclei
    # The library uses the stable ABI of 2.11 and abi3: built here with CUDA, it loads there.
    FORCE_CUDA=1 CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0 ${BUILD_PY:-.venv/bin/python} setup.py build_ext --inplace
    du -sh .gpu tensormask/_C.abi3.so; ls .gpu/whl
    echo "prepared. A library with other kernels to compare: .gpu/patched/_C.abi3.so"
    exit
fi

START=$SECONDS
SHORT=; [ "$DEVICE" = cpu ] && SHORT="--rounds 1 --lambdas 4"
OUT=${OUT:?}
log() { echo "[$((SECONDS - START)) s] $*" | tee -a "$OUT/log.txt"; }
# step SECONDS NAME COMMAND...: run a command with a time limit, and append the end of its output to the log
step() {
    local limit=$1 name=$2 began=$SECONDS; shift 2
    [ "$DEVICE" = cpu ] && limit=$((4 * limit))
    timeout -k 5 "$limit" "$@" >"$WORK/$name.txt" 2>&1; local rc=$?
    { echo "[$((SECONDS - START)) s] $name: rc $rc, $((SECONDS - began)) s"; tail -c 1800 "$WORK/$name.txt"; echo; } | tee -a "$OUT/log.txt"
    return $rc
}
"$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" .gpu/whl/*.whl 2>&1 | tail -2
export PYTHONPATH="$WORK/site:$PWD"
N=$PWD/.gpu/nuclei
learn() { # learn NAME options...
    local name=$1; shift
    "$PY" tools/train_net.py --config-file configs/quickstart.yaml OUTPUT_DIR "$WORK/$name" TEST.EXPECTED_RESULTS "[]" \
        DATASETS.TRAIN "['$N/instances_train.json@$N/train']" DATASETS.TEST "['$N/instances_val.json@$N/val']" \
        MODEL.TENSOR_MASK.NUM_CLASSES 1 INPUT.MIN_SIZE_TRAIN "[384]" INPUT.MAX_SIZE_TRAIN 640 INPUT.MIN_SIZE_TEST 384 \
        INPUT.MAX_SIZE_TEST 640 DATALOADER.ASPECT_RATIO_GROUPING True TEST.DETECTIONS_PER_IMAGE 400 TEST.MAX_DETS 400 \
        TEST.ORACLE_ON False TEST.NUM_VISUALIZED 0 DATALOADER.NUM_WORKERS 6 MODEL.DEVICE "$DEVICE" "$@"
}
export -f learn; export PY N WORK
H="$WORK/helpers"; mkdir -p "$H"
cat >"$H/gpu_check_model.py" <<'PY_END'
"""The model on a GPU against itself on the CPU: every head, float64 to 1e-8, then AMP, syncs, determinism."""
import collections, json, os, signal, sys, time, traceback, warnings
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "dev")]
import torch
import benchmarks  # makes tensormask importable
from tensormask.commands.synthetic import make_image, make_target
from tensormask.config import get_cfg
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.solver import build_ema, build_gradient_clipper, build_lr_scheduler, build_optimizer
from tensormask.engine.step import TrainState, train_step
from tensormask.layers import op_backend
from tensormask.modeling import build_model
from tensormask.utils.random import set_determinism

DEV = os.environ.get("DEVICE", "cuda")
OUT = sys.argv[1]
BIG = (800, 1344) if DEV == "cuda" else (128, 160)
RESULT: dict = {}
SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.OUT_CHANNELS", 32,
         "MODEL.TENSOR_MASK.CLS_CHANNELS", 32, "MODEL.TENSOR_MASK.BBOX_CHANNELS", 32,
         "MODEL.TENSOR_MASK.MASK_CHANNELS", 32, "MODEL.TENSOR_MASK.INIT", "he"]
ONE_SIZE = ["MODEL.ANCHOR_GENERATOR.SIZES", [[60], [120], [240], [480], [960], [1920]]]
H = "MODEL.TENSOR_MASK.HEAD"
CASES = {
    "bipyramid": [],
    "bipyramid, channels_last": ["MODEL.CHANNELS_LAST", True],
    "bipyramid, checkpointed": ["MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True],
    "simple_aligned": [H, "simple_aligned"],
    "simple_natural": [H, "simple_natural"],
    "upscale_aligned": [H, "upscale_aligned", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 3.0, *ONE_SIZE],
    "upscale_natural": [H, "upscale_natural", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 1.5, *ONE_SIZE],
    "no boxes": ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"],
}


def save(key, value):
    RESULT[key] = value
    with open(OUT, "w") as f:
        json.dump(RESULT, f, indent=1)
    print(key, json.dumps(value)[:400], flush=True)


class limit:
    """An alarm around a step that may hang."""

    def __init__(self, seconds): self.seconds = seconds
    def __enter__(self):
        def stop(*_): raise TimeoutError(f"more than {self.seconds} s")
        signal.signal(signal.SIGALRM, stop); signal.alarm(self.seconds)
    def __exit__(self, *_): signal.alarm(0)


def step_named(name, seconds, function):
    start = time.perf_counter()
    try:
        with limit(seconds):
            value = function()
    except BaseException as error:  # what fails does not keep the rest from running
        value = {"error": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc()[-900:]}
    if isinstance(value, dict):
        value["s"] = round(time.perf_counter() - start, 2)
    save(name, value)


def config(device, *opts):
    cfg = get_cfg()
    cfg.merge_from_file("configs/tensormask_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", device, *opts])
    return cfg


def samples(size, empty_first=True, objects=12):
    result = []
    for i in range(2):
        target = make_target(size, 0 if empty_first and i == 0 else objects, 80, seed=i)
        result.append({"image": make_image(size, seed=i), "target": target, "file_name": f"{i}"})
    return result


def gradients(model, batch, dtype):
    model.train()
    losses = model([s["image"] for s in batch], [s["target"] for s in batch])
    sum(losses.values()).backward()
    flat = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return {n: v.item() for n, v in losses.items()}, flat, missing


def compare(opts, dtype, size=(160, 224)):
    """One forward and backward pass, and one detection, on both devices."""
    results, state = [], None
    for device in ("cpu", DEV):
        torch.manual_seed(0)
        model = build_model(config("cpu", *SMALL, *opts)).to(dtype)
        if state is None: state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        model = model.to(device)
        with op_backend("auto" if device == DEV else "reference"):
            results.append(gradients(model, samples(size), dtype))
            model.eval()
            model.score_threshold = 0.0099  # what random weights give
            with torch.no_grad():
                found = model([s["image"] for s in samples(size)])
        results[-1] += ([{k: v.cpu() for k, v in d.items()} for d in found],)
        del model
    (la, ga, ma, fa), (lb, gb, mb, fb) = results
    pairs = list(zip(fa, fb, strict=True))
    def masks_differ(a, b):
        if "masks" not in a or a["masks"].shape != b["masks"].shape: return None
        return (a["masks"] != b["masks"]).sum().item() / max(1, a["masks"].numel())
    return {
        "losses cpu": la, "losses gpu": lb,
        "loss error": max(abs(la[k] - lb[k]) / max(1e-12, abs(la[k])) for k in la),
        "gradient error": ((ga - gb).norm() / ga.norm()).item(),
        "without gradient": [ma, mb],
        "detections": [[len(a["scores"]), len(b["scores"])] for a, b in pairs],
        "score error": max([(a["scores"] - b["scores"]).abs().max().item() for a, b in pairs
                            if len(a["scores"]) == len(b["scores"]) and len(a["scores"])], default=None),
        "mask pixels that differ": [masks_differ(a, b) for a, b in pairs],
    }


def run_steps(*opts, steps=4, size=BIG, small=True):
    """Some steps of training with AMP and all else that the options ask for."""
    cfg = config(DEV, *(SMALL if small else []), "SOLVER.BASE_LR", 0.0005, "SOLVER.CLIP_GRADIENTS.ENABLED", True,
                 "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "SOLVER.WARMUP_ITERS", 1, *opts)
    torch.manual_seed(0)
    set_determinism(deterministic=cfg.DETERMINISTIC, benchmark=cfg.CUDNN_BENCHMARK)
    try:
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        context, scaler = build_autocast(cfg, torch.device(DEV))
        state = TrainState(model, optimizer, build_lr_scheduler(cfg, optimizer), scaler, build_ema(cfg, model))
        clip, batch = build_gradient_clipper(cfg), samples(size, empty_first=False)
        if DEV == "cuda": torch.cuda.reset_peak_memory_stats()
        rows = [train_step(state, batch, iteration=i, clip_gradients=clip, autocast=context,
                           accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS) for i in range(steps)]
    finally:
        set_determinism(deterministic=False, benchmark=False)
    keys = ("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "grad_norm", "loss_scale")
    return {"rows": [{k: row[k] for k in keys if k in row} for row in rows],
            "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if DEV == "cuda" else None}


def same_bits():
    first, second = (run_steps("DETERMINISTIC", True, steps=2, size=(256, 320)) for _ in range(2))
    return {"equal": first["rows"] == second["rows"], "rows": first["rows"]}


def syncs(training):
    """Where the host waits for the device: PyTorch's own warnings, by line."""
    cfg = config(DEV)
    torch.manual_seed(0)
    model = build_model(cfg).train(training)
    batch = samples(BIG, empty_first=False, objects=20)
    for s in batch: s["image"] = s["image"].to(DEV)
    def call():
        if training:
            losses = model([s["image"] for s in batch], [s["target"] for s in batch])
            sum(losses.values()).backward()
        else:
            with torch.no_grad(): model([batch[0]["image"]])
    call()
    places = collections.Counter()
    def show(message, category, filename, lineno, *_):
        # the line of ours that asked for it
        ours = [f"{f.filename.split('tensormask/')[-1]}:{f.lineno}" for f in traceback.extract_stack()
                if "/tensormask/" in f.filename]
        places[ours[-1] if ours else f"{os.path.basename(filename)}:{lineno}"] += "synchroniz" in str(message)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if DEV == "cuda": torch.cuda.set_sync_debug_mode("warn")
        call()
        if DEV == "cuda": torch.cuda.set_sync_debug_mode("default")
    return {"count": sum(places.values()), "places": dict(places.most_common(40))}


if os.environ.get("ONLY") != "deterministic":
    set_float32_precision("highest")
    for name, opts in CASES.items():
        step_named(f"float64 {name}", 25, lambda: compare(opts, torch.float64))
    step_named("float32 bipyramid", 25, lambda: compare([], torch.float32))
    set_float32_precision("high")
    step_named("tf32 bipyramid", 25, lambda: compare([], torch.float32))
    AMP = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE")
    step_named("steps float32 R-50", 30, lambda: run_steps(small=False))
    step_named("steps bfloat16 channels_last R-50", 30, lambda: run_steps(*AMP, "bfloat16", "MODEL.CHANNELS_LAST", True, small=False))
    step_named("steps float16 R-50, EMA, AdamW", 30, lambda: run_steps(*AMP, "float16", "SOLVER.EMA.ENABLED", True, "SOLVER.OPTIMIZER", "AdamW", small=False))
    step_named("steps accumulated, BN, checkpointed", 30, lambda: run_steps("SOLVER.ACCUMULATE_STEPS", 2, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True))
    step_named("syncs training", 25, lambda: syncs(True))
    step_named("syncs inference", 25, lambda: syncs(False))
else:
    set_float32_precision("high")
    step_named("deterministic, twice", 40, same_bits)
PY_END
cat >"$H/gpu_variants.py" <<'PY_END'
"""Changes that are predicted to pay, as patches; each gives the same numbers. Timed in turn by gpu_time_models.py."""
import contextlib
from unittest import mock
import torch
import torch.nn.functional as F
from torchvision.ops import FrozenBatchNorm2d
from tensormask.layers import masks as masks_module
from tensormask.layers.winograd import conv2d
from tensormask.modeling import backbone, box_coder, inference, losses, tensormask, tiles, windows


@contextlib.contextmanager
def fold():
    """Frozen batch norms' scale and bias made once, not by six kernels a convolution."""
    made = {}
    def conv_norm(conv, norm, x):
        if not isinstance(norm, FrozenBatchNorm2d):
            return norm(conv(x))
        if id(norm) not in made:
            with torch.no_grad():
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                made[id(norm)] = norm, scale[:, None, None, None].clone(), norm.bias - norm.running_mean * scale
        _, scale, bias = made[id(norm)]
        if not conv.weight.requires_grad or not torch.is_grad_enabled():
            # Of weights that stay, the product too, in the dtype of the convolution.
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else conv.weight.dtype
            key = id(conv), dtype, conv.weight._version
            if key not in made:
                with torch.no_grad():
                    made[key] = conv, (conv.weight * scale).to(dtype), bias.to(dtype)
            _, weight, bias = made[key]
            return conv2d(x, weight, bias, conv.stride, conv.padding)
        return conv2d(x, conv.weight * scale, bias, conv.stride, conv.padding)
    with mock.patch.object(backbone, "conv_norm", conv_norm):
        yield


@contextlib.contextmanager
def no_syncs():
    """No tensor made of Python numbers on the device; one look for eight fields; indices by arithmetic."""
    made = {}
    def constant(value, dtype, device):
        key = str(value), dtype, device
        if key not in made:
            made[key] = torch.tensor(value, dtype=dtype, device=device)
        return made[key]
    def boxes(self, level, size, y, x):
        strides = constant(self.strides, torch.float32, level.device)
        half = constant(self.sizes, torch.float32, level.device)[level, size] / 2
        cx, cy = x * strides[level], y * strides[level]
        return torch.stack([cx - half, cy - half, cx + half, cy + half], dim=1)
    def decode_boxes(deltas, of_windows, weights):
        size, center = box_coder._size_and_center(of_windows)
        deltas = deltas.to(of_windows.dtype) / constant(weights, of_windows.dtype, of_windows.device)
        center = deltas[:, :2] * size + center
        half = deltas[:, 2:].clamp(max=box_coder._MAX_LOG_SCALE).exp() * size / 2
        return torch.cat([center - half, center + half], dim=1)
    def rescale_and_clip(detections, input_size, output_size):
        (height, width), (out_height, out_width) = input_size, output_size
        like = detections.boxes
        scale = constant([out_width / width, out_height / height] * 2, like.dtype, like.device)
        limit = constant([float(out_width), float(out_height)] * 2, like.dtype, like.device)
        boxes = torch.minimum((detections.boxes * scale).clamp(min=0), limit)
        detections = detections._replace(boxes=boxes, windows=detections.windows * scale)
        return detections.select(((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0])
    def unravel_index(index, shape):
        result = []
        for extent in reversed(tuple(shape)):
            result.append(index % extent)
            index = torch.div(index, extent, rounding_mode="floor")
        return tuple(reversed(result))
    def mask_loss(logits, target_masks, *, positive_weight=1.5):
        target = target_masks.float()
        weight = 1 + (positive_weight - 1) * target
        loss = F.binary_cross_entropy_with_logits(logits.float(), target, weight=weight, reduction="sum")
        return loss / (logits.shape[-1] * logits.shape[-2])
    def group_windows(rows):
        kinds, kind = rows[:, :2].cpu().unique(dim=0, return_inverse=True)
        positions = [torch.where(kind == i)[0] for i in range(len(kinds))]
        order = masks_module.to_device(torch.cat(positions) if positions else kind, rows.device)
        parts = rows[order][:, 2:].split([len(p) for p in positions])
        return [(k, s, part) for (k, s), part in zip(kinds.tolist(), parts, strict=True)], positions
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (inference, "_group_windows", group_windows),
            (windows.Windows, "boxes", boxes), (inference, "decode_boxes", decode_boxes),
            (tensormask, "rescale_and_clip", rescale_and_clip), (torch, "unravel_index", unravel_index),
            (tensormask, "mask_loss", mask_loss),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def paste():
    """Pasting by two products of matrices, rows and columns apart: no grid of 8 bytes a pixel."""
    def sample(masks, boxes, region):
        x0, y0, x1, y1 = region
        def weights(start, end, low, high, side):
            at = torch.arange(start, end, device=boxes.device, dtype=boxes.dtype) + 0.5
            at = (at - low[:, None]) / (high - low)[:, None] * side - 0.5
            cells = torch.arange(side, device=boxes.device, dtype=boxes.dtype)
            return (1 - (at[:, :, None] - cells).abs()).clamp(min=0)
        left, top, right, bottom = boxes.unbind(1)
        rows = weights(y0, y1, top, bottom, masks.shape[1])
        columns = weights(x0, x1, left, right, masks.shape[2])
        return torch.bmm(torch.bmm(rows, masks.to(rows.dtype)), columns.mT) >= 0.5
    with mock.patch.object(masks_module, "_sample", sample):
        yield


@contextlib.contextmanager
def dense_boxes(model):
    """The box tower over the whole map: 133 GFLOP more in inference, no wait and 100 launches less."""
    before, model.dense_boxes = model.dense_boxes, True
    try:
        yield
    finally:
        model.dense_boxes = before
PY_END
cat >"$H/gpu_time_models.py" <<'PY_END'
"""Times ours and torchvision's Mask R-CNN as they are and with predicted changes; top kernels. One dtype a process."""
import contextlib, json, os, statistics, sys, time, traceback
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "dev"), HERE]
import argparse
import torch
from benchmarks import inference, models, train
from benchmarks.models import OURS, THEIRS
from tensormask.commands.synthetic import make_image
import gpu_variants as V

DEV = os.environ.get("DEVICE", "cuda")
OUT, DTYPE = sys.argv[1], sys.argv[2]
PARTS = sys.argv[3].split(",")
SIZE = (800, 1344) if DEV == "cuda" else (320, 416)
ROUNDS = 7 if DEV == "cuda" else 1
if DEV != "cuda" and DTYPE == "tf32": DTYPE = "float32"
RESULT: dict = {"size": SIZE, "gpu": torch.cuda.get_device_name() if DEV == "cuda" else "cpu", "torch": torch.__version__}


def save():
    """Into the file of all dtypes, after each step."""
    whole = json.load(open(OUT)) if os.path.exists(OUT) else {}
    whole[DTYPE] = RESULT
    with open(OUT, "w") as f:
        json.dump(whole, f, indent=1)


def sync():
    if DEV == "cuda": torch.cuda.synchronize()


def in_turn(calls, rounds=ROUNDS, warmup=2):
    times = {n: [] for n in calls}
    for i in range(-warmup if DEV == "cuda" else 0, rounds):
        for name, (context, call) in calls.items():
            try:
                with context():
                    sync(); start = time.perf_counter(); call(); sync()
                    if i >= 0: times[name].append(1e3 * (time.perf_counter() - start))
            except Exception as error:
                times[name] = [f"{type(error).__name__}: {error}"[:300]]; print(name, traceback.format_exc()[-600:])
    return {n: {"median ms": statistics.median(t), "min ms": min(t)} if t and not isinstance(t[0], str) else t for n, t in times.items()}


def top_kernels(call, count=14):
    if DEV != "cuda": call(); return None
    from torch.profiler import ProfilerActivity, profile
    call(); sync()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        sync(); start = time.perf_counter(); call(); sync(); wall = time.perf_counter() - start
    rows = [e for e in record.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda e: -e.self_device_time_total)
    host = {e.key: e.count for e in record.key_averages() if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaHostAlloc", "cudaMalloc", "cudaEventSynchronize", "cudaDeviceSynchronize")}
    return {"wall ms": 1e3 * wall, "kernels ms": sum(e.self_device_time_total for e in rows) / 1e3, "number": sum(e.count for e in rows),
            "host": host, "top": [[e.key[:110], e.count, round(e.self_device_time_total / 1e3, 3)] for e in rows[:count]]}


def guarded(name, function):
    start = time.perf_counter()
    try: RESULT[name] = function()
    except Exception as error: RESULT[name] = {"error": f"{type(error).__name__}: {error}"[:400], "where": traceback.format_exc()[-800:]}
    print(f"{name} ({time.perf_counter() - start:.1f} s)", json.dumps(RESULT[name])[:1500], flush=True)
    save()


def both(*contexts):
    @contextlib.contextmanager
    def context():
        with contextlib.ExitStack() as stack:
            for c in contexts: stack.enter_context(c())
            yield
    return context


def arguments(channels_last, batch=1):
    opts = ["MODEL.CHANNELS_LAST", channels_last, "TEST.DETECTIONS_PER_IMAGE", 100 if DEV == "cuda" else 20]
    return argparse.Namespace(config_file=models.CONFIG_FILE, size=SIZE, batch=batch, device=DEV, dtype=DTYPE, rounds=ROUNDS,
        threads=torch.get_num_threads(), opts=opts, objects=20, positive_iou=0.5)


def infer():
    calls = {}
    for channels_last in (False, True):
        args = arguments(channels_last)
        layout = "channels_last" if channels_last else "nchw"
        image, cfg = make_image(SIZE), models.configure(args)
        ours, theirs = (inference.build(cfg, name, SIZE, 1) for name in (OURS, THEIRS))
        a, b = (inference.make_call(cfg, name, model, SIZE, 1) for name, model in ((OURS, ours), (THEIRS, theirs)))
        on_device = [image.to(DEV)]
        @torch.no_grad()
        def detect(model=ours): return model.detect(on_device)
        @torch.no_grad()
        def dense(model=ours):
            with model._autocast(): return model.dense(on_device)
        @torch.no_grad()
        def theirs_unpasted(model=theirs, call=b):
            old, model.transform.postprocess = model.transform.postprocess, lambda result, *_: result
            try: return call()
            finally: del model.transform.postprocess
        plain = contextlib.nullcontext
        calls |= {f"tensormask {layout}": (plain, a), f"tensormask detect {layout}": (plain, detect), f"tensormask dense part {layout}": (plain, dense),
                  f"torchvision {layout}": (plain, b), f"torchvision without pasting {layout}": (plain, theirs_unpasted)}
        if channels_last:
            with_boxes = lambda model=ours: V.dense_boxes(model)
            calls |= {"+ fold": (V.fold, a), "+ no syncs": (V.no_syncs, a), "+ paste": (V.paste, a), "+ dense boxes": (with_boxes, a),
                      "+ all": (both(V.fold, V.no_syncs, V.paste, with_boxes), a), "+ all, detect": (both(V.fold, V.no_syncs, with_boxes), detect)}
            keep = (a, b)
    times = in_turn(calls)
    base = times["tensormask channels_last"]
    RESULT["inference profile ours"] = top_kernels(keep[0]); save()
    RESULT["inference profile torchvision"] = top_kernels(keep[1], 8); save()
    return times


def training():
    calls, keep = {}, None
    for batch in (1, 2) if DEV == "cuda" else (1,):
        args = arguments(True, batch)
        cfg = models.configure(args)
        step_ours, step_theirs = (train.make_step(args, cfg, name)[1] for name in (OURS, THEIRS))
        a, b = (lambda step=step: step(SIZE) for step in (step_ours, step_theirs))
        plain = contextlib.nullcontext
        calls |= {f"tensormask x{batch}": (plain, a), f"torchvision x{batch}": (plain, b), f"+ fold x{batch}": (V.fold, a), f"+ no syncs x{batch}": (V.no_syncs, a),
                  f"+ both x{batch}": (both(V.fold, V.no_syncs), a)}
        keep = (a, b)
    times = in_turn(calls, rounds=5 if DEV == "cuda" else 1)
    RESULT["training profile ours"] = top_kernels(keep[0], 20); save()
    RESULT["training profile torchvision"] = top_kernels(keep[1], 8); save()
    return times


models.configure(arguments(False))
if "infer" in PARTS: guarded("inference", infer)
if DEV == "cuda": torch.cuda.empty_cache()
if "train" in PARTS: guarded("training", training)
PY_END
cat >"$H/gpu_kernels.py" <<'PY_END'
"""The op at windows by one library: right against its own CPU kernels, and times at the windows of a training image."""
import json, os, statistics, sys, time
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "dev")]
import torch
import benchmarks  # makes tensormask importable
from tensormask.commands.synthetic import make_target
from tensormask.config import get_cfg
from tensormask.modeling.assignment import assign
from tensormask.modeling.build import build_windows
from tensormask.layers import _native
LABEL, OUT = sys.argv[1], sys.argv[2]
DEV = os.environ.get("DEVICE", "cuda"); ops = torch.ops.tensormask
cfg = get_cfg(); cfg.merge_from_file("configs/tensormask_R_50_FPN_1x.yaml")
geometry = build_windows(cfg); H, W = (200, 336) if DEV == "cuda" else (50, 84)
grids = [(-(-4 * H // s), -(-4 * W // s)) for s in geometry.strides]

def ms(call, inner=10, rounds=7):
    if DEV != "cuda":
        start = time.perf_counter(); call(); return 1e3 * (time.perf_counter() - start)
    for _ in range(3): call()
    times = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(); a.record()
        for _ in range(inner): call()
        b.record(); b.synchronize(); times.append(a.elapsed_time(b) / inner)
    return statistics.median(times)

rows = []
for images, objects in ((1, 20), (2, 7)):
    boxes = [make_target((4 * H, 4 * W), objects, 80, seed=i)["boxes"] for i in range(images)]
    positives = assign(boxes, geometry, grids)
    for level, size, at in positives.groups():
        ratio, side = geometry.strides[level] // 4, geometry.mask_sizes[size]
        windows = torch.stack([positives.image, positives.y, positives.x], 1)[at].contiguous()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(images, side**2, H, W).to(dtype)
            expected = ops.swap_align2nat_at(x, windows, ratio, -6.0)
            grad = torch.randn_like(expected)
            back = ops.swap_align2nat_at_backward(grad, windows, ratio, images, H, W)
            xg, wg, gg = x.to(DEV), windows.to(DEV), grad.to(DEV)
            f, b = ops.swap_align2nat_at(xg, wg, ratio, -6.0), ops.swap_align2nat_at_backward(gg, wg, ratio, images, H, W)
            eps = torch.finfo(dtype).eps
            # channels_last input, as the 1x1 convolution gives it
            xc = xg.contiguous(memory_format=torch.channels_last)
            rows.append({"images": images, "lambda": ratio, "side": side, "windows": len(windows), "dtype": str(dtype)[6:],
                "forward error/eps": ((f.cpu() - expected).abs().max() / eps).item(), "backward error/eps": ((b.cpu() - back).abs().max() / eps).item(),
                "forward ms": ms(lambda: ops.swap_align2nat_at(xg, wg, ratio, -6.0)), "forward channels_last ms": ms(lambda: ops.swap_align2nat_at(xc, wg, ratio, -6.0)),
                "backward ms": ms(lambda: ops.swap_align2nat_at_backward(gg, wg, ratio, images, H, W)), "zeros ms": ms(lambda: torch.zeros_like(xg))})
many = []
for count in (1000, 6000):
    limits = (1, H, W); windows = torch.stack([torch.randint(n, (count,)) for n in limits], 1).to(DEV)
    x = torch.randn(1, 225, H, W, device=DEV); f = ops.swap_align2nat_at(x, windows, 1, -6.0); g = torch.randn_like(f)
    many.append({"windows": count, "forward ms": ms(lambda: ops.swap_align2nat_at(x, windows, 1, -6.0)), "backward ms": ms(lambda: ops.swap_align2nat_at_backward(g, windows, 1, 1, H, W))})
total = {k: sum(r[k] for r in rows if r["images"] == 1 and r["dtype"] == d) for d in ("float32",) for k in ("forward ms", "backward ms", "zeros ms")}
whole = json.load(open(OUT)) if os.path.exists(OUT) else {}
whole[LABEL] = {"library": str(_native.LIBRARY), "rows": rows, "many": many, "image of 20 objects, float32": total}
json.dump(whole, open(OUT, "w"), indent=1)
worst = max(max(r["forward error/eps"], r["backward error/eps"]) for r in rows)
print(LABEL, "worst error in eps", worst, total, many)
PY_END

cat >"$H/env.py" <<'PY_END'
"""Ceilings of this card and of its host: bytes, products, convolutions by layout, launches, waits."""
import json, os, sys, time
import torch
from torch import nn
dev = os.environ.get("DEVICE", "cuda"); gpu = dev == "cuda"
from tensormask.layers import _native
class Saved(dict):
    """Writes the file after each entry, so that results survive a kill."""
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        json.dump(self, open(sys.argv[1], "w"), indent=1)
r = Saved({"torch": torch.__version__, "python": sys.version.split()[0], "cpus": os.cpu_count(), "library": str(_native.LIBRARY), "devices": sorted(_native.DEVICES), "reason": _native.REASON})
def ms(call, inner=10, rounds=5):
    def sync():
        if gpu: torch.cuda.synchronize()
    call(); call(); best = []
    for _ in range(rounds):
        sync(); s = time.perf_counter()
        for _ in range(inner): call()
        sync(); best.append((time.perf_counter() - s) / inner * 1e3)
    return sorted(best)[len(best) // 2]
if gpu:
    p = torch.cuda.get_device_properties(0)
    r.update({"gpu": p.name, "sm": p.multi_processor_count, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability()})
n = 1 << (30 if gpu else 22)
a = torch.randn(n // 4, device=dev); b = torch.empty_like(a)
r["copy TB/s"] = 2 * n / ms(lambda: b.copy_(a)) / 1e9
m = 8192 if gpu else 256
for name, dtype, high in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
    torch.backends.cuda.matmul.allow_tf32 = high
    x, y = torch.randn(m, m, device=dev, dtype=dtype), torch.randn(m, m, device=dev, dtype=dtype)
    r[f"matmul {name} TFLOP/s"] = 2 * m**3 / ms(lambda: x @ y, 4, 3) / 1e9
h, w = (200, 336) if gpu else (20, 33)
for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
    for layout in (torch.contiguous_format, torch.channels_last):
        for cin, cout, k in ((256, 256, 3), (128, 128, 3), (128, 225, 1)):
            conv = nn.Conv2d(cin, cout, k, padding=k // 2).to(dev, dtype).to(memory_format=layout)
            x = torch.randn(1, cin, h, w, device=dev, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            flops = 2 * cin * cout * k * k * h * w
            key = f"conv {k}x{k} {cin}->{cout} {str(dtype)[6:]} {'channels_last' if layout == torch.channels_last else 'nchw'}"
            with torch.no_grad(): t = ms(lambda: conv(x))
            y = conv(x); g = torch.randn_like(y)
            tb = ms(lambda: torch.autograd.grad(y, (x, *conv.parameters()), g, retain_graph=True), 5, 3)
            r[key] = {"forward ms": t, "TFLOP/s": flops / t / 1e9, "backward ms": tb, "backward TFLOP/s": 2 * flops / tb / 1e9}
s = torch.zeros(8, device=dev)
r["small op us"] = 1e3 * ms(lambda: s.add_(1), 1000, 3)
r["item us"] = 1e3 * ms(lambda: s[0].item(), 200, 3)
r["torch.tensor on device us"] = 1e3 * ms(lambda: torch.tensor(1.5, device=dev), 200, 3)
if gpu: r["pin and copy us"] = 1e3 * ms(lambda: torch.zeros(64).pin_memory().to(dev, non_blocking=True), 200, 3)
print(json.dumps(r)[:1500])
PY_END
cat >"$H/det.py" <<'PY_END'
"""DETERMINISTIC True: does a step end, and do two runs have the same bits? torchvision's roi_align is compiled Python then."""
import os, runpy, sys
sys.argv = ["gpu_check_model.py", sys.argv[1]]
os.environ["ONLY"] = "deterministic"
runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu_check_model.py"), run_name="__main__")
PY_END

case $PART in
1)
    { nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu --format=csv; nvcc --version | tail -1; "$PY" --version; } 2>&1 | tee -a "$OUT/log.txt"
    [ "$DEVICE" = cpu ] || "$PY" -c 'import sys; from tensormask.layers import _native; print(_native.LIBRARY, _native.REASON); sys.exit("cuda" not in _native.DEVICES)' ||
        { rm -f tensormask/_C*.so; FORCE_CUDA=1 CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0 step 100 build "$PY" -m tensormask.commands.build_ops; }
    step 60 env "$PY" "$H/env.py" "$OUT/env.json"

    log "correctness: three side by side, no times"
    tests() {
        timeout -k 5 90 "$PY" tests/layers/test_swap_align2nat_cuda.py
        if command -v compute-sanitizer >/dev/null; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 90 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "$PY" tests/layers/test_swap_align2nat_cuda.py --small
            echo "memcheck: rc $?"
            timeout -k 5 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$PY" -c '
import torch; from tensormask.layers import swap_align2nat
for lam, side in ((1, 15), (4, 5), (8, 11)):
    x = torch.randn(1, side**2, 24, 40, device="cuda", requires_grad=True); swap_align2nat(x, lam).sum().backward()
torch.cuda.synchronize()'
            echo "racecheck: rc $?"
        fi
    }
    export -f tests
    (timeout -k 5 190 bash -c tests 2>&1 | tail -c 60000 >"$OUT/tests.txt") & pids="$!"
    (step 170 model "$PY" "$H/gpu_check_model.py" "$OUT/model.json") & pids="$pids $!"
    (timeout -k 5 170 bash -c "learn nuclei SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER ${ITER:-500}" >"$WORK/learn.txt" 2>&1
     { echo "rc $?"; grep -aE "iter: |AP|time|memory|swap_align2nat|rror" "$WORK/learn.txt" | tail -60; tail -5 "$WORK/learn.txt"; } >"$OUT/learn.txt") & pids="$pids $!"
    wait $pids
    { tail -25 "$OUT/tests.txt"; tail -14 "$OUT/learn.txt"; } | cut -c1-220 | tee -a "$OUT/log.txt"

    log "times: one at a time"
    step 50 kernels "$PY" "$H/gpu_kernels.py" main "$OUT/kernels.json"
    if [ -e .gpu/patched/_C.abi3.so ]; then
        mkdir -p "$WORK/patched"; cp -r tensormask tools dev configs tests "$WORK/patched/"; cp .gpu/patched/_C.abi3.so "$WORK/patched/tensormask/"
        (cd "$WORK/patched"; export PYTHONPATH="$WORK/site:$WORK/patched"; step 50 kernels_patched "$PY" "$H/gpu_kernels.py" patched "$OUT/kernels.json"
         step 40 tests_patched "$PY" tests/layers/test_swap_align2nat_cuda.py --small)
    fi
    step 60 op "$PY" dev/benchmark.py op --device "$DEVICE" --dtypes float32 float16 bfloat16 --without-reference $SHORT --json "$OUT/op.json"
    step 110 models_bf16 "$PY" "$H/gpu_time_models.py" "$OUT/models.json" bfloat16 infer,train
    step 110 models_tf32 "$PY" "$H/gpu_time_models.py" "$OUT/models.json" tf32 infer,train
    log "part 1 done"
    ;;
2)
    # Compiling runs beside the project's own tables of memory; its times are read after it, alone.
    step 40 inference "$PY" dev/benchmark.py inference --device "$DEVICE" --size ${SIZE:-800 1344} --dtype bfloat16 --json "$OUT/inference.json" MODEL.CHANNELS_LAST True
    step 40 train "$PY" dev/benchmark.py train --device "$DEVICE" --size ${SIZE:-800 1344} --dtype bfloat16 --batch 2 --json "$OUT/train.json" MODEL.CHANNELS_LAST True
    step 75 compile "$PY" dev/benchmark.py inference --without floor memory --device "$DEVICE" --size ${SIZE:-800 1344} --dtype bfloat16 --json "$OUT/compile.json" MODEL.COMPILE reduce-overhead MODEL.CHANNELS_LAST True
    if command -v ncu >/dev/null; then
        cat >"$H/ncu.py" <<'PY_END'
import torch
from tensormask.layers import swap_align2nat
ops = torch.ops.tensormask
for dtype in (torch.float32, torch.bfloat16):
    for lam in (1, 4, 32):
        x = torch.randn(1, 225, 200, 336, device="cuda", dtype=dtype)
        w = torch.stack([torch.zeros(17, dtype=torch.int64), torch.randint(-(-200 // lam), (17,)), torch.randint(-(-336 // lam), (17,))], 1).cuda()
        m = ops.swap_align2nat_at(x, w, lam, -6.0); ops.swap_align2nat_at_backward(torch.randn_like(m), w, lam, 1, 200, 336)
        y = ops.swap_align2nat(x, lam, -6.0); ops.swap_align2nat_backward(torch.randn_like(y), lam, 200, 336)
torch.cuda.synchronize()
PY_END
        timeout -k 5 45 ncu --clock-control none --kernel-name regex:"windows_|dense_" --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_bytes.sum,sm__inst_executed.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__sass_average_branch_targets_threads_uniform.pct,l1tex__data_bank_conflicts_pipe_lsu.sum "$PY" "$H/ncu.py" 2>&1 | grep -vE "^==PROF==" | cut -c1-150 >"$OUT/ncu.txt"
        log "ncu: $(grep -c duration "$OUT/ncu.txt") kernels"
    fi
    (timeout -k 5 60 bash -c "learn nuclei_bf16 SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER ${ITER:-300} SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16 MODEL.CHANNELS_LAST True" >"$WORK/learn2.txt" 2>&1
     { echo "rc $?"; grep -aE "iter: |AP|rror" "$WORK/learn2.txt" | tail -30; } >"$OUT/learn.txt")
    tail -5 "$OUT/learn.txt" | cut -c1-220
    # Last: a step can take minutes, or all memory (torchvision's roi_align in Python).
    step 45 det "$PY" "$H/det.py" "$OUT/det.json"
    log "part 2 done"
    ;;
esac
exit 0
