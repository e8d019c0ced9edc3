#!/usr/bin/env bash
# Check and measure everything in a few minutes of a GPU: `bash dev/gpu/check.sh PART`, PART 1 or 2.
#
#   1   is everything right: kernels, the model of every head, learning, determinism; about 250 s
#   2   the times: kernels, models beside torchvision's, compiled models; about 300 s
#
# With all limits reached, each ends within 9 minutes. It runs in the repository's root, without
# network, after `make gpu-prepare` on a machine with network. The exit code is 1 if a step failed.
# Each step has its own limit of time, and writes to $OUT (output/gpu) as it goes, so that results
# survive a kill. DEVICE=cpu is a dry run, with small images and longer limits.
# Files of part 1: log_1.txt ceilings.json tests.txt devices.json deterministic.json learning.txt
# Files of part 2: log_2.txt kernels.json op.json times.json inference.json train.json ncu.txt
#
# No GPU was at hand when this was written: the CUDA tests, compute-sanitizer, ncu and the profiler
# have never run.
set -uo pipefail
PART=${1:?give the part, 1 or 2}
PY=${PY:-python3}
OUT=${OUT:-output/gpu}
WORK=${WORK:-$(mktemp -d)}
export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=ERROR PY OUT WORK
export PYTHONPATH="$WORK/site:$PWD:$PWD/dev"
mkdir -p "$OUT" "$WORK"
rm -f "$OUT/log_$PART.txt"

log() { echo "[$SECONDS s] $*" | tee -a "$OUT/log_$PART.txt"; }

# step SECONDS NAME COMMAND...: run a command with a limit; the log gets the end of its output.
step() {
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    [ "$DEVICE" = cuda ] || limit=$((10 * limit))
    timeout -k 5 "$limit" "$@" >"$WORK/$name.txt" 2>&1
    log "$name: exit code $?, $((SECONDS - began)) s"
    tail -c 1800 "$WORK/$name.txt" | tee -a "$OUT/log_$PART.txt"
    echo | tee -a "$OUT/log_$PART.txt"
}

# learn NAME [KEY VALUE ...]: train on nuclei and evaluate; learning.txt gets losses and AP.
learn() {
    local name=$1 sets=(DATASETS.TRAIN "('nuclei_train',)" DATASETS.TEST "('nuclei_val',)")
    local folder=$PWD/.gpu/nuclei
    shift
    if [ -d "$folder" ]; then
        sets=(DATASETS.TRAIN "('$folder/instances_train.json@$folder/train',)"
            DATASETS.TEST "('$folder/instances_val.json@$folder/val',)")
    fi
    "$PY" tools/train_net.py --config-file nuclei "${sets[@]}" MODEL.DEVICE "$DEVICE" \
        OUTPUT_DIR "$WORK/$name" TEST.ORACLE_ON False TEST.NUM_VISUALIZED 0 \
        DATALOADER.NUM_WORKERS 6 TEST.EVAL_PERIOD 0 "$@" >"$WORK/$name.txt" 2>&1
    { echo "$name: exit code $?"; grep -aE "iter: |AP|rror" "$WORK/$name.txt" | tail -40; } >>"$OUT/learning.txt"
}

# The tests of the kernels, and again under compute-sanitizer.
tests() {
    local file=tests/layers/test_swap_align2nat_cuda.py
    timeout -k 5 90 "$PY" $file
    echo "tests: exit code $?"
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return; }
    # Without the caching allocator, memcheck sees accesses beyond a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 90 compute-sanitizer --tool memcheck \
        --report-api-errors no --error-exitcode 1 "$PY" $file --small
    echo "memcheck: exit code $?"
    timeout -k 5 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$PY" $file --small
    echo "racecheck: exit code $?"
}
export -f tests learn

# benchmark SECONDS NAME ARGUMENTS...: a table of dev/benchmark.py.
benchmark() {
    local limit=$1 name=$2 table=$3
    shift 3
    step "$limit" "$name" "$PY" dev/benchmark.py "$table" --device "$DEVICE" --json "$OUT/$name.json" "$@"
}

if compgen -G ".gpu/wheels/*.whl" >/dev/null; then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" .gpu/wheels/*.whl
fi
amp=(--dtype bfloat16 --size 800 1344)
short=()
if [ "$DEVICE" != cuda ]; then
    amp=(--size 128 160 --rounds 1)
    short=(--rounds 1 --lambdas 4)
fi

case $PART in
1)
    { nvidia-smi; nvcc --version | tail -1; "$PY" --version; } 2>&1 | tee -a "$OUT/log_$PART.txt"
    if [ "$DEVICE" = cuda ] && ! "$PY" -c 'import gpu, sys; from tensormask.layers import _native
print(_native.LIBRARY, _native.REASON); sys.exit("cuda" not in _native.DEVICES)'; then
        step 100 build env FORCE_CUDA=1 CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" \
            "$PY" -m tensormask.commands.build_ops
    fi
    step 60 ceilings "$PY" -m gpu.ceilings "$OUT/ceilings.json"

    log "right? three side by side, no times"
    rm -f "$OUT/learning.txt"
    (timeout -k 5 200 bash -c tests 2>&1 | tail -c 60000 >"$OUT/tests.txt") &
    pids=$!
    (step 180 devices "$PY" -m gpu.devices "$OUT/devices.json") &
    pids="$pids $!"
    (timeout -k 5 180 bash -c "learn float32 SOLVER.MAX_ITER ${ITERATIONS:-500}") &
    wait $pids $!
    timeout -k 5 60 bash -c "learn bfloat16 SOLVER.MAX_ITER ${ITERATIONS:-300} SOLVER.IMS_PER_BATCH 8 \
        SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16"
    step 45 deterministic "$PY" -m gpu.devices "$OUT/deterministic.json" deterministic
    tail -25 "$OUT/tests.txt" | tee -a "$OUT/log_$PART.txt"
    tail -30 "$OUT/learning.txt" | tee -a "$OUT/log_$PART.txt"
    ;;
2)
    step 50 kernels "$PY" -m gpu.kernels compiled "$OUT/kernels.json"
    benchmark 40 op op --without-reference --dtypes float32 bfloat16 "${short[@]}"
    step 100 times_bfloat16 "$PY" -m gpu.times "$OUT/times.json" bfloat16 all
    step 100 times_tf32 "$PY" -m gpu.times "$OUT/times.json" tf32 all
    benchmark 40 inference inference "${amp[@]}"
    benchmark 40 train train "${amp[@]}" --batch 2
    step 120 compiled "$PY" -m gpu.times "$OUT/times.json" bfloat16 inference MODEL.COMPILE reduce-overhead
    if command -v ncu >/dev/null && [ "$DEVICE" = cuda ]; then
        metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
        metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed.sum
        metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
        timeout -k 5 45 ncu --clock-control none --kernel-name 'regex:windows_|dense_|paste_|sort_' \
            --metrics $metrics "$PY" -m gpu.ncu_kernels 2>&1 | grep -v "^==PROF==" >"$OUT/ncu.txt"
        log "ncu: $(grep -c duration "$OUT/ncu.txt") kernels"
    fi
    ;;
esac
log "part $PART is done"
! grep -E "exit code [1-9]" "$OUT/log_$PART.txt"
