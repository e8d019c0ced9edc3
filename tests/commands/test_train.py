"""The command `tools/train_net.py`: its messages, exit codes and log, and a small real run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tensormask
from tensormask.commands import train as train_net
from tensormask.engine import trainer
from tensormask.engine.anomaly import NonFiniteError
from tensormask.engine.signals import TrainingStopped
from tensormask.evaluation import UnexpectedResultsError
from tensormask.utils.errors import UserError
from tensormask.utils.files import DiskFullError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments in (
        ["--config-file", str(tmp_path / "missing.yaml")],
        ["SOLVER.BASE_LRR", "1"],
        ["SOLVER.BASE_LR"],
        ["--num-gpus", "2"],
        ["--eval-only", "OUTPUT_DIR", str(tmp_path)],
    ):
        assert train_net.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), arguments
        assert error.count("\n") == 1, arguments


def bug_in_the_package():
    """Fail at a line that belongs to the package, by its traceback."""
    code = compile("list(zip([1], [1, 2], strict=True))", tensormask.__file__, "exec")
    exec(code)


@pytest.mark.parametrize(
    "bug, error",
    [
        (lambda: {}["x"], KeyError),
        (lambda: json.loads("{"), ValueError),
        (bug_in_the_package, ValueError),
    ],
    ids=["here", "in a library", "in the package"],
)
def test_a_bug_keeps_its_traceback(monkeypatch, bug, error):
    monkeypatch.setattr(train_net, "train", lambda cfg, resume: bug())
    with pytest.raises(error):
        train_net.main([])


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("a key"), 2),
        (FileNotFoundError("a file"), 2),
        (UnexpectedResultsError("AP"), 1),
        (NonFiniteError("NaN"), 1),
        (DiskFullError("full"), 1),
        (TrainingStopped(15), 143),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def run(cfg, resume):
        raise error

    monkeypatch.setattr(train_net, "train", run)
    assert train_net.main([]) == code
    expected = "" if code == 143 else f"error: {error}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [ValueError("a bug"), UserError("a mistake")])
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path, fakes, monkeypatch, capsys, error):
    """With its traceback, unless it is a user's mistake; the console has it only once."""

    def step(*args, **options):
        raise error

    monkeypatch.setattr(trainer, "train_step", step)
    opts = [*("OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)")]
    opts += ["MODEL.TENSOR_MASK.NUM_CLASSES", "2", "SOLVER.IMS_PER_BATCH", "2"]
    is_bug = not isinstance(error, UserError)
    if is_bug:
        with pytest.raises(ValueError, match="a bug"):
            train_net.main(opts)
    else:
        assert train_net.main(opts) == 2
    log = (tmp_path / "log.txt").read_text()
    assert f"ERROR {error}" in log
    assert ("Traceback" in log) is is_bug
    assert str(error) not in capsys.readouterr().out


def write_coco(folder, size=64):
    """Write two noisy images with a square each in COCO's format; return the set's name."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in (1, 2):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": size, "width": size})
        x0, x1 = 10, 40
        annotations.append(
            {
                **{"id": i, "image_id": i, "category_id": 9, "iscrowd": 0},
                **{"bbox": [x0, x0, x1 - x0, x1 - x0], "area": (x1 - x0) ** 2},
                "segmentation": [[x0, x0, x1, x0, x1, x1, x0, x1]],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 9, "name": "square"}],
    }
    (folder / "set.json").write_text(json.dumps(content))
    return f"{folder / 'set.json'}@{folder}"


def test_a_small_real_run(tmp_path):
    name = write_coco(tmp_path)
    arguments = [
        *("--config-file", str(ROOT / "configs" / "quickstart.yaml"), "--num-gpus", "0"),
        *("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.TENSOR_MASK.NUM_CLASSES", "1", "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.TENSOR_MASK.NUM_CONVS", "1", "TEST.EXPECTED_RESULTS", "[]"),
        *(
            "TEST.ORACLE_ON",
            "True",
            "TEST.NUM_VISUALIZED",
            "1",
            "SOLVER.IMS_PER_BATCH",
            "2",
            "TEST.EVAL_PERIOD",
            "1",
        ),
    ]

    whole, evaluated = tmp_path / "whole", tmp_path / "evaluated"
    more = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(whole)]
    assert train_net.main([*arguments, *more]) == 0
    last = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "segm/AP", "segm/AP-square", "oracle/AP"} <= set(last)
    more = ["MODEL.WEIGHTS", str(whole / "model_final.pth"), "OUTPUT_DIR", str(evaluated)]
    assert train_net.main(["--eval-only", *arguments, *more]) == 0
    results = [
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        for folder in (whole, evaluated)
    ]
    assert results[0] == results[1]
