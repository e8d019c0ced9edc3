"""Two Gloo processes on the CPU against one: training, evaluation, and the death of a rank."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fork
import pytest
import tiny
import torch
from run_folders import content

from tensormask.commands import train as train_net
from tensormask.data import build_train_loader
from tensormask.data.shapes import write_split
from tensormask.engine.resume import load_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tools" / "train_net.py")
STARTS = {
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"),
        *("--nproc-per-node=2", SCRIPT),
    ],
    "num-gpus": [sys.executable, SCRIPT, "--num-gpus", "2"],
}
SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in STARTS]
TIMEOUT = 240  # seconds; of a launch, which takes 10 to 20 on two free cores


@pytest.fixture
def config(tmp_path):
    """Path of a small config of six images: two have no objects, one cannot be read."""
    write_split("train", 6, tmp_path)
    (tmp_path / "images" / "000004.png").write_bytes(b"no image")
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (2, 5)]
    path.write_text(json.dumps(content))
    name = f"{path}@{tmp_path}/images"
    cfg = tiny.get_cfg("bipyramid", [
        *("MODEL.TENSOR_MASK.NUM_CLASSES", 6, "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.0),
        *("DATASETS.TRAIN", (name,), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
        *("DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (64,)),
        *("INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5, "TEST.NUM_VISUALIZED", 2),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.WARMUP_ITERS", 0),
        *("SOLVER.STEPS", (5,), "SOLVER.BASE_LR", 0.002, "SEED", 3),
    ])  # fmt: skip
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path / "config.yaml"


def start(how, *arguments):
    """Start a launch in the background; a pipe has its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    return subprocess.Popen([*STARTS[how], *map(str, arguments)], env=environment, **pipes)


def finish(process):
    """Wait for a launch; return its exit code and output."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()  # its processes end with it
    return process.returncode, output


def run(how, *arguments):
    """Run a launch that must succeed; return its output."""
    code, output = finish(start(how, *arguments))
    assert code == 0, output
    return output


def run_forked(capfd, *arguments):
    """Run the command in two forked processes; return their output."""
    codes = fork.run_in_ranks(lambda: train_net.main(list(map(str, arguments))))
    output = "".join(capfd.readouterr())
    assert codes == [0, 0], output
    return output


def metrics(folder, key):
    """Return the records of a metrics.json that have a key."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


@pytest.mark.parametrize("how", ["fork", *SLOW])
def test_training_equals_one_process(config, tmp_path, capfd, how):
    """Also if one rank has no objects; with accumulated gradients for torchrun."""
    cfg = tiny.tensormask.get_cfg()
    cfg.merge_from_file(config)
    batches = itertools.islice(build_train_loader(cfg), 6)
    has_objects = [{len(sample["target"]["labels"]) > 0 for sample in batch} for batch in batches]
    assert {True, False} in has_objects
    opts = ["DATASETS.TEST", "()"]
    if how == "torchrun":
        opts += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--config-file", str(config), *opts, "OUTPUT_DIR"]
    # The forks come first, since this process remembers the issues of its run.
    output = run_forked(capfd, *arguments, two) if how == "fork" else run(how, *arguments, two)
    assert train_net.main([*arguments, str(one)]) == 0
    assert output.count("iter: 6/6") == 1  # only rank 0 logs
    assert metrics(two, "issues") == metrics(one, "issues") != []
    (expected,), (found,) = (metrics(folder, "total_loss") for folder in (one, two))
    assert found.keys() == expected.keys()
    for name in ("loss_cls", "loss_box_reg", "loss_mask", "total_loss", "grad_norm", "lr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    expected, found = (load_checkpoint(f / "model_final.pth")["model"] for f in (one, two))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-5), name
    files = {path.name for path in one.iterdir() if "tfevents" not in path.name}
    assert {path.name for path in two.iterdir() if "tfevents" not in path.name} == files
    assert len(list(two.glob("*tfevents*"))) == 1


def test_gradients_are_exchanged_in_bfloat16(config, tmp_path, capfd):
    records, weights = [], []
    for dtype in ("", "bfloat16"):
        out = tmp_path / f"of{dtype}"
        arguments = ["--config-file", config, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2]
        run_forked(capfd, *arguments, "SOLVER.REDUCE_DTYPE", dtype, "OUTPUT_DIR", out)
        records.append(metrics(out, "total_loss")[-1])
        weights.append(load_checkpoint(out / "model_final.pth")["model"])
    exact, rounded = records
    assert exact["grad_norm"] != rounded["grad_norm"]
    assert exact["grad_norm"] == pytest.approx(rounded["grad_norm"], rel=0.01)  # 2^-8 a value
    assert all(torch.allclose(a, weights[1][n], atol=1e-3) for n, a in weights[0].items())


def test_evaluation_equals_one_process(config, tmp_path, capfd):
    model = tiny.build("bipyramid", ["MODEL.TENSOR_MASK.NUM_CLASSES", 6])
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--eval-only", "--config-file", str(config)]
    arguments += ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "OUTPUT_DIR"]
    output = run_forked(capfd, *arguments, two)
    assert train_net.main([*arguments, str(one)]) == 0
    tables = [text[text.index(" AP50") : text.index("crescent")] for text in (
        (one / "log.txt").read_text(), output, (two / "log.txt").read_text()
    )]  # fmt: skip
    assert tables[0] == tables[1] == tables[2]
    files = [p.relative_to(one) for p in (one / "inference").rglob("*") if p.is_file()]
    assert len(files) >= 4  # results, two images, the montage
    for path in files:
        assert content(two / path) == content(one / path), path
    results = json.loads((two / "inference" / "coco_instances_results.json").read_text())
    assert len(results) == 25
    assert metrics(two, "issues") == metrics(one, "issues") != []
    assert not list((two / "inference").glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_death_of_a_rank_ends_the_run_and_resume_continues(config, tmp_path):
    out = tmp_path / "out"
    arguments = ["--config-file", str(config), "DATASETS.TEST", "()", "OUTPUT_DIR", str(out)]
    more = ["SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 100_000]
    process = start("num-gpus", *arguments, *more)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (out / "last_checkpoint").exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        ranks = [int(word) for word in children.split()]
        assert len(ranks) == 2
        killed_at = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        code, output = finish(process)
    finally:
        process.kill()
    assert time.monotonic() - killed_at < 60
    assert code == 1
    assert f"error: rank 1 of 2 (process {ranks[1]}) ended with signal SIGKILL" in output
    for rank in ranks:
        assert not Path(f"/proc/{rank}").exists()

    checkpoint = load_checkpoint(out / (out / "last_checkpoint").read_text())
    saved = checkpoint["iteration"] + 1
    assert saved % 4 == 0
    output = run("num-gpus", "--resume", *arguments, "SOLVER.MAX_ITER", saved + 3)
    assert f"Training iterations {saved} to {saved + 3}, 2 images each" in output
    assert load_checkpoint(out / "model_final.pth")["iteration"] == saved + 2
