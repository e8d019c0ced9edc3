"""A small quickstart by its command: train, evaluate, draw, resume bit-identically."""

import json
from pathlib import Path

import pytest
import torch

import tensormask
from tensormask.commands import predict, train
from tensormask.data.shapes import write_split

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, str]:
    """Small shapes sets as custom data, `annotations.json@images`."""
    sets = {}
    for split, num_images in (("train", 12), ("val", 4)):
        folder = tmp_path_factory.mktemp(split)
        write_split(split, num_images, folder)
        sets[split] = f"{folder / 'annotations.json'}@{folder / 'images'}"
    return sets


def arguments(shapes: dict[str, str], output: Path, *more: object) -> list[str]:
    opts = [
        "DATASETS.TRAIN", [shapes["train"]], "DATASETS.TEST", [shapes["val"]],
        "OUTPUT_DIR", output, "MODEL.DEVICE", "cpu",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 1,
        "SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.005, *more,
    ]  # fmt: skip
    return ["--config-file", str(ROOT / "configs" / "quickstart.yaml"), *map(str, opts)]


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert train.main(arguments(shapes, output, "TEST.EVAL_PERIOD", 2)) == 0
    return output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "model_final.pth", weights_only=True)["model"]


def test_the_files_of_a_run(run) -> None:
    for name in (
        "config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_0000001.pth",
        "model_final.pth", "inference/coco_instances_results.json", "inference/montage.png",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents.*"))
    assert len(list((run / "inference" / "images").glob("*.png"))) == 4
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    (trained,) = (line for line in lines if "lr" in line)
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= trained.keys()
    assert [line["iteration"] for line in lines if "segm/AP" in line] == [1, 3]
    assert {"bbox/AP", "segm/AP", "segm/AP-star"} <= lines[-1].keys()
    assert 0 <= lines[-1]["segm/AP"] <= 100
    assert 20 < lines[-1]["oracle/AP"] <= 100
    for result in json.loads((run / "inference/coco_instances_results.json").read_text()):
        assert result.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_same_seed_same_bits(run, shapes, tmp_path) -> None:
    """With another number of workers, and resumed after two iterations."""
    stopped = tmp_path / "stopped"
    more = ["DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", []]
    assert train.main(arguments(shapes, stopped, *more)) == 0
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    (stopped / "model_final.pth").unlink()
    assert train.main(["--resume", *arguments(shapes, stopped, "DATASETS.TEST", [])]) == 0
    expected = weights(run)
    for name, value in weights(stopped).items():
        assert torch.equal(value, expected[name]), name


def test_eval_only_repeats_the_results(run, shapes, tmp_path) -> None:
    """And compares them with the expected ones."""
    expected = [["segm", "AP", 99.0, 0.5]]
    more = ["MODEL.WEIGHTS", run / "model_final.pth", "TEST.EXPECTED_RESULTS", expected]
    assert train.main(["--eval-only", *arguments(shapes, tmp_path, *more)]) == 1
    results = "inference/coco_instances_results.json"
    assert (tmp_path / results).read_text() == (run / results).read_text()
    assert "MAX_ITER: 4" in (tmp_path / "config.yaml").read_text()  # for a report
    assert "command" in (tmp_path / "environment.txt").read_text()


def test_a_checkpoint_of_another_model_is_not_evaluated(run, shapes, tmp_path, capsys) -> None:
    more = ["MODEL.WEIGHTS", run / "model_final.pth", "MODEL.TENSOR_MASK.CLS_CHANNELS", 32]
    assert train.main(["--eval-only", *arguments(shapes, tmp_path, *more)]) == 2
    assert "head.cls_subnet.0.weight" in capsys.readouterr().err


def test_without_masks(run, shapes, tmp_path) -> None:
    more = ["MODEL.WEIGHTS", run / "model_final.pth", "MODEL.MASK_ON", False]
    assert train.main(["--eval-only", *arguments(shapes, tmp_path, *more)]) == 0


def test_predictor_and_demo(run, shapes, tmp_path) -> None:
    images = Path(shapes["val"].split("@")[1])
    predictor = tensormask.Predictor(run / "config.yaml", run / "model_final.pth")
    detections = predictor(images / "000001.png")
    assert detections["masks"].shape == (len(detections["scores"]), 128, 128)
    assert predictor.class_names[3] == "star"
    assert set(detections["class_names"]) <= set(predictor.class_names)

    assert predict.main([
        *("--config-file", str(run / "config.yaml"), "--weights", str(run / "model_final.pth")),
        *("--input", str(images), "--output", str(tmp_path), "--confidence-threshold", "0.0"),
        *("MODEL.DEVICE", "cpu", "MODEL.TENSOR_MASK.SCORE_THRESH_TEST", "0.005"),
    ]) == 0  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"{i:06d}.png" for i in range(1, 5)]
    results = json.loads((tmp_path / "detections.json").read_text())
    first = [result["score"] for result in results if result["image_id"] == 0]
    assert first == pytest.approx(detections["scores"].tolist(), rel=1e-4)  # four in a batch
