"""Data sets with every kind of issue: each issue is reported, and training uses the rest."""

import json
import sys

import pytest
from damage import ANNOTATION_DAMAGES, STILL_TRAINABLE, damage
from tiny import CONFIGS

from tensormask.commands import check as check_dataset
from tensormask.commands import train as train_net
from tensormask.data import CocoDataset, catalog, shapes
from tensormask.data.checks import issues
from tensormask.data.statistics import check_files

DATA = CONFIGS.parents[1] / "shared" / "data"
SETS = {
    "coco_cc": (DATA / "coco_cc/instances_train.json", DATA / "coco_cc/train"),
    "nuclei": (DATA / "nuclei_dsb2018/instances_val.json", DATA / "nuclei_dsb2018/val"),
}
NUM_IMAGES = 30
# Issues that only opening the images shows; one of the two empty masks is a polygon.
ONLY_IN_FILES = {"image_broken": 3, "image_size": 1, "mask_empty": 1}

opened_files: list[str] = []


@pytest.fixture(autouse=True)
def _read_sets_again(nothing_left_behind):
    catalog._loaded.clear()  # checks add issues to the cached set


@pytest.fixture(scope="module")
def opened():
    """The files that this process opens; Python cannot remove an audit hook."""

    def hook(event, arguments):
        if event == "open":
            opened_files.append(str(arguments[0]))

    sys.addaudithook(hook)
    return opened_files


@pytest.fixture(scope="module", params=["shapes", *SETS])
def damaged(request, tmp_path_factory):
    """A set, its damaged copy, and the damaged ids by kind."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    if request.param == "shapes":
        shapes.write_split("train", NUM_IMAGES, source)
    else:
        if not SETS[request.param][0].exists():
            pytest.skip(f"{SETS[request.param][0]} does not exist")
        copy_first_images(*SETS[request.param], source)
    return source, folder / "bad", damage(*files_of(source), folder / "bad")


def copy_first_images(json_file, image_root, folder):
    content = json.loads(json_file.read_text())
    content["images"] = content["images"][:NUM_IMAGES]
    copied = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in copied]
    (folder / "images").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(content))
    for image in content["images"]:
        name = image["file_name"]
        (folder / "images" / name).write_bytes((image_root / name).read_bytes())


def files_of(folder):
    return folder / "annotations.json", folder / "images"


def name_of(folder):
    return "@".join(map(str, files_of(folder)))


def counts_of(done, unknown=()):
    """The number of issues of each kind, without those of `unknown` that only files show."""
    counts = {kind: len(ids) for kind, ids in done.items()}
    for kind in unknown:
        counts[kind] -= ONLY_IN_FILES[kind]
    return {kind: count for kind, count in counts.items() if count}


def test_every_kind_of_issue_is_present(damaged):
    # object_too_small depends on the input size, not on the file.
    assert set(damaged[2]) == set(issues.ISSUES) - {"object_too_small"}


def test_all_issues_are_counted_with_their_ids(damaged, monkeypatch):
    monkeypatch.setattr(issues, "NUM_FIRST_IDS", 1000)
    source, folder, done = damaged
    dataset = CocoDataset("damaged", *files_of(folder))
    assert dataset.issues.counts == counts_of(done, ONLY_IN_FILES)
    for _ in range(2):  # a second check counts nothing twice
        assert sum(check_files(dataset)) == len(dataset)
        assert dataset.issues.counts == counts_of(done)
    for kind, ids in done.items():
        assert sorted(dataset.issues.first_ids[kind], key=str) == sorted(ids, key=str), kind

    undamaged = CocoDataset("undamaged", *files_of(source))
    assert not undamaged.issues
    lost = ANNOTATION_DAMAGES.keys() - STILL_TRAINABLE
    num_lost = sum(len(ANNOTATION_DAMAGES[kind]) for kind in lost)
    num_lost -= 1  # the empty polygon, which has points and a box
    assert dataset.num_trainable.sum() == undamaged.num_trainable.sum() - num_lost


def test_check_dataset_prints_all_issues(damaged, tmp_path, capsys, opened):
    _, folder, done = damaged
    opened.clear()
    arguments = [name_of(folder), "--num-workers", "0", "--json", str(tmp_path / "found.json")]
    arguments += ["--config-file", str(CONFIGS / "quickstart.yaml")]
    assert check_dataset.main(arguments) == 1
    printed = capsys.readouterr().out
    for kind, ids in done.items():
        assert f"{len(ids):7d}  {kind}: " in printed
    (record,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert {kind: issue["count"] for kind, issue in record["issues"].items()} == counts_of(done)
    assert record["contents"]["images"] == NUM_IMAGES
    assert_only_image_root_is_read(opened, folder)


def test_training_and_evaluation_continue(damaged, tmp_path, opened):
    _, folder, done = damaged
    opened.clear()
    assert train_net.main(training(folder, tmp_path)) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    reported = [record["issues"][name_of(folder)] for record in records if "issues" in record]
    expected_at_start = counts_of(done, ONLY_IN_FILES)
    expected_at_end = counts_of(done, {"mask_empty"})  # evaluation opens every image
    for expected, record in ((expected_at_start, reported[0]), (expected_at_end, reported[-1])):
        counts = {kind: issue["count"] for kind, issue in record.items()}
        counts.pop("object_too_small", None)
        assert counts == expected
    assert any("total_loss" in record for record in records)
    assert {"bbox/AP", "segm/AP"} <= set(records[-1]) | set(records[-2])
    log = (tmp_path / "log.txt").read_text()
    for kind in done:
        assert kind in log
    assert_only_image_root_is_read(opened, folder)


def test_strict_makes_an_error_with_the_table_of_issues(damaged, tmp_path, capsys):
    _, folder, done = damaged
    assert train_net.main([*training(folder, tmp_path), "DATASETS.STRICT", "True"]) == 2
    error = capsys.readouterr().err
    assert "DATASETS.STRICT" in error
    for kind, count in counts_of(done, ONLY_IN_FILES).items():
        assert f"{count:7d}  {kind}: " in error
    assert not list(tmp_path.glob("*.pth"))


def training(folder, output):
    """Return the command line of a few iterations of a tiny model without workers."""
    content = json.loads((folder / "annotations.json").read_text())
    num_classes = len([c for c in content["categories"] if c["id"] not in (4711, 4712)]) - 1
    small = (
        "DATALOADER.NUM_WORKERS 0 MODEL.TENSOR_MASK.NUM_CONVS 1 MODEL.FPN.OUT_CHANNELS 16 "
        "MODEL.TENSOR_MASK.CLS_CHANNELS 16 MODEL.TENSOR_MASK.BBOX_CHANNELS 16 "
        "MODEL.TENSOR_MASK.MASK_CHANNELS 16 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 "
        "INPUT.MAX_SIZE_TRAIN 96 INPUT.MAX_SIZE_TEST 96 SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 "
        "TEST.NUM_VISUALIZED 2 TEST.ORACLE_ON False "
        f"MODEL.TENSOR_MASK.NUM_CLASSES {num_classes} MODEL.DEVICE cpu"
    )
    sets = ["DATASETS.TRAIN", f"('{name_of(folder)}',)", "DATASETS.TEST", f"('{name_of(folder)}',)"]
    config = ["--config-file", str(CONFIGS / "quickstart.yaml")]
    return [*config, *small.split(), *sets, "OUTPUT_DIR", str(output)]


def assert_only_image_root_is_read(opened, folder):
    images = [path for path in opened if path.startswith(str(folder / "images"))]
    assert len(images) > 10  # the hook works
    assert not [path for path in opened if "secret" in path]
