"""Sets that are damaged in every way: all of it is said, and the rest is trained on."""

import json
import sys
from pathlib import Path

import pytest
from damage import ANNOTATION_DAMAGES, STILL_TRAINABLE, damage

from tensormask.commands import check as check_dataset
from tensormask.commands import train as train_net
from tensormask.data import CocoDataset, catalog, shapes
from tensormask.data.checks import issues as issues
from tensormask.data.statistics import check_files

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SETS = {
    "coco_cc": (DATA / "coco_cc/instances_train.json", DATA / "coco_cc/train"),
    "nuclei": (DATA / "nuclei_dsb2018/instances_val.json", DATA / "nuclei_dsb2018/val"),
}
# Issues that no look at the annotations finds; the second of the empty masks is a polygon.
ONLY_IN_FILES = {"image_broken": 3, "image_size": 1, "mask_empty": 1}

opened_files: list[str] = []


@pytest.fixture(autouse=True)
def _sets_are_read_anew(nothing_left_behind):
    catalog._load.cache_clear()  # what a check finds is added to the set that is kept


@pytest.fixture(scope="module")
def opened():
    """The files that this process opens; the hook cannot be taken away again."""

    def hook(event, arguments):
        if event == "open":
            opened_files.append(str(arguments[0]))

    sys.addaudithook(hook)
    return opened_files


@pytest.fixture(scope="module", params=["shapes", *SETS])
def damaged(request, tmp_path_factory):
    """A damaged set: its source, its folder, and what was done to it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "shapes":
        shapes.write_split("train", 60, folder / "whole")
        source = (folder / "whole/annotations.json", folder / "whole/images")
    else:
        source = SETS[request.param]
        if not source[0].exists():
            pytest.skip(f"{source[0]} is not there")
    return source, folder / "bad", damage(*source, folder / "bad")


def name_of(folder):
    return f"{folder / 'annotations.json'}@{folder / 'images'}"


def num_of(done, unseen=()):
    """How many of each kind were done, without some that a look does not find."""
    counts = {kind: len(ids) for kind, ids in done.items()}
    for kind in unseen:
        counts[kind] -= ONLY_IN_FILES[kind]
    return {kind: count for kind, count in counts.items() if count}


def test_every_kind_is_damaged(damaged):
    # This one depends on the input size and is no issue of the file.
    assert set(damaged[2]) == set(issues.ISSUES) - {"object_too_small"}


def test_everything_is_reported_with_its_ids(damaged, monkeypatch):
    monkeypatch.setattr(issues, "NUM_FIRST_IDS", 1000)
    (json_file, image_root), folder, done = damaged
    dataset = CocoDataset("damaged", folder / "annotations.json", folder / "images")
    assert dataset.issues.counts == num_of(done, ONLY_IN_FILES)
    assert sum(check_files(dataset)) == len(dataset)
    assert dataset.issues.counts == num_of(done)
    for kind, ids in done.items():
        assert sorted(dataset.issues.first_ids[kind], key=str) == sorted(ids, key=str), kind
    # A second look finds nothing new.
    sum(check_files(dataset))
    assert dataset.issues.counts == num_of(done)

    whole = CocoDataset("whole", json_file, image_root)
    assert not whole.issues
    lost = (
        sum(len(done[kind]) for kind in ANNOTATION_DAMAGES.keys() - STILL_TRAINABLE) - 1
    )  # the empty polygon, which has points and a box
    assert dataset.num_trainable.sum() == whole.num_trainable.sum() - lost


def test_check_dataset_reports_it(damaged, tmp_path, capsys, opened):
    _, folder, done = damaged
    opened.clear()
    arguments = [name_of(folder), "--num-workers", "0", "--json", str(tmp_path / "found.json")]
    arguments += ["--config-file", str(ROOT / "configs" / "quickstart.yaml")]
    assert check_dataset.main(arguments) == 1
    printed = capsys.readouterr().out
    for kind, ids in done.items():
        assert f"{len(ids):7d}  {kind}: " in printed
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert {kind: issue["count"] for kind, issue in found["issues"].items()} == num_of(done)
    assert found["contents"]["images"] > 50
    assert_nothing_outside_is_opened(opened, folder)


def test_training_and_evaluation_go_on(damaged, tmp_path, opened):
    _, folder, done = damaged
    opened.clear()
    assert train_net.main(training(folder, tmp_path)) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    said = [record["issues"][name_of(folder)] for record in records if "issues" in record]
    expected_at_start = num_of(done, ONLY_IN_FILES)
    expected = num_of(done, {"mask_empty"})  # evaluation has tried every image by now
    for counts, record in ((expected_at_start, said[0]), (expected, said[-1])):
        found = {kind: issue["count"] for kind, issue in record.items()}
        found.pop("object_too_small", None)
        assert found == counts
    assert any("total_loss" in record for record in records)
    assert {"bbox/AP", "segm/AP"} <= set(records[-1]) | set(records[-2])
    log = (tmp_path / "log.txt").read_text()
    for kind in done:
        assert kind in log
    assert_nothing_outside_is_opened(opened, folder)


def test_strict_is_an_error_with_the_table(damaged, tmp_path, capsys):
    _, folder, done = damaged
    assert train_net.main([*training(folder, tmp_path), "DATASETS.STRICT", "True"]) == 2
    error = capsys.readouterr().err
    assert "DATASETS.STRICT" in error
    for kind, count in num_of(done, ONLY_IN_FILES).items():
        assert f"{count:7d}  {kind}: " in error
    assert not list(tmp_path.glob("*.pth"))


def training(folder, output):
    """The command line of a few iterations of a tiny model, in this process alone."""
    content = json.loads((folder / "annotations.json").read_text())
    num_classes = len([c for c in content["categories"] if "name" in c]) - 1  # one is there twice
    small = (
        "DATALOADER.NUM_WORKERS 0 MODEL.TENSOR_MASK.NUM_CONVS 1 MODEL.FPN.OUT_CHANNELS 16 "
        "MODEL.TENSOR_MASK.CLS_CHANNELS 16 MODEL.TENSOR_MASK.BBOX_CHANNELS 16 "
        "MODEL.TENSOR_MASK.MASK_CHANNELS 16 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 "
        "INPUT.MAX_SIZE_TRAIN 96 INPUT.MAX_SIZE_TEST 96 SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 "
        "TEST.EXPECTED_RESULTS [] TEST.NUM_VISUALIZED 2 TEST.ORACLE_ON False "
        f"MODEL.TENSOR_MASK.NUM_CLASSES {num_classes} MODEL.DEVICE cpu"
    )
    sets = ["DATASETS.TRAIN", f"('{name_of(folder)}',)", "DATASETS.TEST", f"('{name_of(folder)}',)"]
    config = ["--config-file", str(ROOT / "configs" / "quickstart.yaml")]
    return [*config, *small.split(), *sets, "OUTPUT_DIR", str(output)]


def assert_nothing_outside_is_opened(opened, folder):
    images = [path for path in opened if path.startswith(str(folder / "images"))]
    assert len(images) > 10  # it watches
    assert not [path for path in opened if "secret" in path]
