"""The command `tools/check_dataset.py`: its output, its exit codes, the facts of real data sets."""

import json
import re
from pathlib import Path

import pytest

import tensormask
from tensormask.commands import check as check_dataset
from tensormask.data import catalog, shapes
from tensormask.data.checks.issues import ISSUES

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
QUICKSTART = ["--config-file", str(ROOT / "configs" / "quickstart.yaml")]


@pytest.fixture(autouse=True)
def _fresh_sets():
    catalog._loaded.clear()  # a check adds issues to the cached data set


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Ten drawn images."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write_split("val", 10, folder)
    return folder


def name_of(folder):
    return f"{folder / 'annotations.json'}@{folder / 'images'}"


def run(arguments, tmp_path, capsys):
    """The exit code, the record of --json and what is printed."""
    code = check_dataset.main([*arguments, "--json", str(tmp_path / "found.json")])
    return code, json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out


def test_a_data_set_without_issues(drawn, tmp_path, capsys):
    name = name_of(drawn)
    code, records, printed = run([name, *QUICKSTART], tmp_path, capsys)
    assert code == 0
    assert list(records) == [name]
    content = json.loads((drawn / "annotations.json").read_text())
    num_objects = len(content["annotations"])
    assert records[name]["contents"]["objects"] == num_objects
    assert records[name]["issues"] == {}
    assert f"{num_objects} of {num_objects} (100.00%) of the objects match a window" in printed
    assert "No issues." in printed
    assert "Windows: those of the config" in printed
    assert "Overrides" not in printed
    assert records[name]["proposal"]["overrides"] == "MODEL.TENSOR_MASK.NUM_CLASSES 6"
    for category in content["categories"]:
        boxes = [a for a in content["annotations"] if a["category_id"] == category["id"]]
        assert not boxes or re.search(rf"{category['name']} .* {len(boxes)}\n", printed)


def test_proposed_overrides_can_be_pasted(drawn, tmp_path, capsys):
    # Windows too small for half of the objects, and a wrong number of classes.
    small = ["MODEL.TENSOR_MASK.IN_FEATURES", "['p2']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[20,28]]"]
    small += ["MODEL.TENSOR_MASK.ASSIGNMENT", "atss", "MODEL.TENSOR_MASK.NUM_CLASSES", "80"]
    arguments = [name_of(drawn), *QUICKSTART, *small]
    code, records, printed = run(arguments, tmp_path, capsys)
    assert code == 0
    (found,) = records.values()
    assert "ASSIGNMENT atss: a matched object has " in printed
    assert 6 < found["coverage"]["windows_per_matched_object"] < 9
    assert found["coverage"]["unmatched"]["larger than the largest window"] > 0
    assert found["proposal"]["matched"] > found["coverage"]["matched"]
    assert f"  {found['proposal']['overrides']}\n" in printed
    assert "Classes: 6, and 80 in the config" in printed

    overrides = re.findall(r'"[^"]*"|\S+', found["proposal"]["overrides"])
    cfg = tensormask.get_cfg()
    cfg.merge_from_file(QUICKSTART[1])
    cfg.merge_from_list([word.strip('"') for word in overrides])
    cfg.MODEL.DEVICE = "cpu"
    model = tensormask.build_model(cfg)
    assert cfg.MODEL.TENSOR_MASK.NUM_CLASSES == 6
    # Checked with them, the same number of objects is matched.
    pasted = [word.strip('"') for word in overrides]
    _, records, _ = run([name_of(drawn), *QUICKSTART, *pasted], tmp_path, capsys)
    (again,) = records.values()
    assert again["coverage"]["matched"] == found["proposal"]["matched"]
    assert again["coverage"]["windows"] == [list(sizes) for sizes in model.windows.sizes]


def test_issues_of_files_are_found_unless_fast(tmp_path, capsys):
    shapes.write_split("val", 3, tmp_path)
    image = tmp_path / "images" / "000002.png"
    image.write_bytes(image.read_bytes()[:100])
    arguments = [name_of(tmp_path), *QUICKSTART]
    code, _, printed = run([*arguments, "--fast"], tmp_path, capsys)
    assert code == 0
    assert "images were not opened" in printed
    code, records, printed = run(arguments, tmp_path, capsys)
    assert code == 1
    assert "1  image_broken: the file cannot be read as an image" in printed
    (found,) = records.values()
    assert found["issues"] == {"image_broken": {"count": 1, "first_ids": [2]}}


def test_hints_that_are_no_issues(tmp_path, capsys):
    shapes.write_split("val", 3, tmp_path)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][2]["file_name"] = content["images"][1]["file_name"]
    content["categories"].append({"id": 70, "name": "disc"})
    content["categories"].append({"id": 71, "name": "hexagon"})
    first = content["annotations"][0]
    content["annotations"] += [first | {"id": 1000 + i} for i in range(101)]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    code, _, printed = run([name_of(tmp_path), *QUICKSTART], tmp_path, capsys)
    assert code == 0
    assert "Names of several classes: disc\n" in printed
    assert "Files of several images: 000002.png\n" in printed
    assert re.search(r"Classes without objects: .*hexagon", printed)
    assert re.search(r"TEST.DETECTIONS_PER_IMAGE and TEST.MAX_DETS to 1\d\d or more", printed)
    assert "match several objects" in printed


def test_user_errors_are_one_line(drawn, tmp_path, capsys):
    no_set = tmp_path / "list.json"
    no_set.write_text("[]")
    for arguments in (
        ["shapes_valley"],
        [f"{no_set}@{tmp_path}"],
        [name_of(drawn), "INPUT.MIN_SIZE_TESST", "3"],
        [name_of(drawn), "--config-file", str(tmp_path / "none.yaml")],
    ):
        assert check_dataset.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), arguments
        assert "Traceback" not in error
    with pytest.raises(SystemExit):
        check_dataset.main(["INPUT.MIN_SIZE_TEST", "3"])


def test_the_documentation_has_the_table_of_issues():
    text = (ROOT / "docs" / "data_issues.md").read_text(encoding="utf-8")
    lines = text.partition("## In a conversion")[0].splitlines()
    rows = [line for line in lines if line.startswith("| `") and line.count("|") == 4]
    kinds = [row for row in rows if row.split("`")[1] in ISSUES]
    assert kinds == [
        f"| `{kind}` | {issue.meaning} | {issue.outcome} |" for kind, issue in ISSUES.items()
    ]


# From the READMEs of these data sets.
FACTS = {
    "coco_cc/instances_train.json@coco_cc/train": {
        **{"images": 92, "annotations": 829, "crowds": 9, "images_without_objects": 1},
        **{"objects": 820, "num_classes": 80, "num_classes_used": 67, "most": None},
    },
    "coco_cc/instances_val.json@coco_cc/val": {
        **{"images": 66, "annotations": 560, "crowds": 8, "images_without_objects": 2},
        **{"objects": 552, "num_classes": 80, "num_classes_used": 62, "most": None},
    },
    "nuclei_dsb2018/instances_train.json@nuclei_dsb2018/train": {
        **{"images": 531, "annotations": 22293, "crowds": 0, "images_without_objects": 0},
        **{"objects": 22293, "num_classes": 1, "num_classes_used": 1, "most": 340},
    },
    "nuclei_dsb2018/instances_val.json@nuclei_dsb2018/val": {
        **{"images": 133, "annotations": 5063, "crowds": 0, "images_without_objects": 0},
        **{"objects": 5063, "num_classes": 1, "num_classes_used": 1, "most": None},
    },
}


@pytest.mark.parametrize(
    "data_set",
    [pytest.param(n, marks=[pytest.mark.slow] if "train" in n else []) for n in FACTS],
)
def test_real_sets_have_no_issues_and_the_facts_of_their_readme(data_set, tmp_path, capsys):
    json_file, folder = data_set.split("@")
    if not (DATA / json_file).exists():
        pytest.skip(f"{DATA / json_file} is not available")
    name = f"{DATA / json_file}@{DATA / folder}"
    # The annotations of the largest are enough here.
    fast = ["--fast"] if "nuclei_dsb2018/train" in data_set else []
    code, records, printed = run([name, *QUICKSTART, *fast], tmp_path, capsys)
    found = records[name]["contents"]
    assert code == 0, printed
    facts = dict(FACTS[data_set])
    if (most := facts.pop("most")) is not None:
        assert found["objects_per_image"][1] == most
    assert len(found["by_class"]) == facts.pop("num_classes")
    used = [row for row in found["by_class"].values() if any(row.values())]
    # Every class with crowds also has objects.
    assert len(used) == facts.pop("num_classes_used")
    assert {key: found[key] for key in facts} == facts
