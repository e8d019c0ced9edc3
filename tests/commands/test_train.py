"""The command `tools/train_net.py`: what it says, its exit codes, a run of all the real parts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tensormask.commands import train as train_net
from tensormask.engine.anomaly import NonFiniteError
from tensormask.evaluation import UnexpectedResultsError

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_command_says_mistakes_in_one_line(tmp_path, capsys):
    for arguments in (
        ["--config-file", str(tmp_path / "none.yaml")],
        ["SOLVER.BASE_LRR", "1"],
        ["SOLVER.BASE_LR"],
        ["--num-gpus", "2"],
        ["--eval-only", "OUTPUT_DIR", str(tmp_path)],
    ):
        assert train_net.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), arguments
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "bug, error",
    [(lambda: {}["x"], KeyError), (lambda: json.loads("{"), ValueError)],
    ids=["ours", "of a library"],
)
def test_command_keeps_the_traceback_of_a_bug(monkeypatch, bug, error):
    monkeypatch.setattr(train_net, "train", lambda cfg, resume: bug())
    with pytest.raises(error):
        train_net.main([])


def test_command_exit_codes(monkeypatch):
    def raising(error):
        def run(cfg, resume):
            raise error

        return run

    for error in (UnexpectedResultsError("AP"), NonFiniteError("NaN")):
        monkeypatch.setattr(train_net, "train", raising(error))
        assert train_net.main([]) == 1


def write_coco(folder, size=64):
    """Two noisy images with a square each, in COCO's format; the name of the set."""
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


def test_command_with_the_real_parts(tmp_path):
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
