"""The command `tools/visualize_data.py` and the drawing of windows."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tensormask.commands import visualize_data
from tensormask.data import shapes
from tensormask.modeling.assignment import assign
from tensormask.modeling.windows import Windows
from tensormask.visualization.instances import DIMMED, WHITE, draw_windows, instance_color

ROOT = Path(__file__).parents[2]
WINDOWS = Windows(strides=(4, 8), sizes=((44, 60), (88, 120)))


def grey(height=400, width=400):
    return np.full((height, width, 3), 100, np.uint8)


def test_matched_and_unmatched_objects_look_different():
    image, dark = grey(), round(100 * DIMMED)
    boxes = [[100, 100, 140, 140], [200, 200, 300, 300]]
    drawn = draw_windows(image, boxes, [[90, 90, 150, 150]], [0])
    assert (image == 100).all()
    assert (drawn[[90, 120], 120] == instance_color(0)).all()  # the window and its center
    assert not (drawn[105, 105] == dark).all()  # the object is tinted
    assert (drawn[[200, 250], 250] == WHITE).all()  # the other one is crossed out
    assert (drawn[[10, 230], [10, 250]] == dark).all()


def test_windows_may_reach_out_of_the_image_and_are_magnified():
    image = grey(50, 100)
    box, window = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[-12.0, -12, 32, 32]])
    drawn = draw_windows(image, box, window, torch.tensor([0]), magnify=3)
    assert drawn.shape == (150, 300, 3)
    assert (drawn[30, 95] == instance_color(0)).all()
    assert draw_windows(image, [], [], []).shape == (250, 500, 3)


@pytest.mark.parametrize("matched", [[1], []])
def test_a_window_needs_its_object(matched):
    with pytest.raises(ValueError, match="row of the boxes"):
        draw_windows(grey(), [[0, 0, 5, 5]], [[0, 0, 9, 9]], matched)


def test_which_windows_are_drawn():
    boxes = torch.tensor([[108.0, 108, 148, 148], [20, 20, 50, 50]])
    assignment = assign([boxes], WINDOWS, [(64, 64), (32, 32)])
    rows = visualize_data.windows_to_draw(assignment, boxes)
    assert len(rows) < len(assignment.object)
    keys = torch.stack([assignment.object, assignment.level, assignment.size], 1)
    assert sorted(keys[rows].tolist()) == sorted(keys.unique(dim=0).tolist())
    # The center of the first is a window's center on both levels.
    at = [row for row in rows if assignment.object[row] == 0]
    assert [assignment.boxes[row].view(2, 2).mean(0).tolist() for row in at] == [[128, 128]] * 3

    many = torch.tensor([[x, y, x + 30.0, y + 30] for x in range(9, 200, 24) for y in (9, 90, 170)])
    many = torch.cat([many, many + 12])
    assert len(many) > visualize_data.CROWDED
    assignment = assign([many], WINDOWS, [(64, 64), (32, 32)])
    rows = visualize_data.windows_to_draw(assignment, many)
    objects = assignment.object[rows].tolist()
    assert sorted(objects) == assignment.object.unique().tolist()
    sides = assignment.boxes[:, 2] - assignment.boxes[:, 0]
    for row, index in zip(rows, objects, strict=True):
        assert sides[row] == sides[assignment.object == index].min()


def test_the_legend_counts():
    boxes = torch.tensor([[108.0, 108, 148, 148]])
    assignment = assign([boxes], WINDOWS, [(64, 64), (32, 32)])
    assert visualize_data.describe_assignment(assignment, WINDOWS) == [
        "p2 44 px: 1 object in 1 window",
        "p2 60 px: 1 object in 5 windows",
        "p3 88 px: 1 object in 5 windows",
    ]


def command(folder, output, *more):
    return [
        *("--config-file", str(ROOT / "configs" / "quickstart.yaml"), "--output", str(output)),
        *("--num", "3", *more, "DATALOADER.NUM_WORKERS", "0"),
        *("DATASETS.TRAIN", f"['{folder / 'annotations.json'}@{folder / 'images'}']"),
    ]


def test_command_draws_the_first_images_of_a_training(tmp_path, capsys):
    shapes.write_split("train", 4, tmp_path / "set")
    nearest = ["MODEL.TENSOR_MASK.ASSIGNMENT", "nearest", "MODEL.TENSOR_MASK.ASSIGN_RADIUS", "2.0"]
    for output, seed, opts in (("a", "1", []), ("b", "1", []), ("c", "2", []), ("d", "1", nearest)):
        words = command(tmp_path / "set", tmp_path / output, "--seed", seed)
        assert visualize_data.main([*words, *opts]) == 0
    assert "3 images written" in capsys.readouterr().out
    first, again, other, assigned = (
        {path.name: path.read_bytes() for path in (tmp_path / output).iterdir()}
        for output in "abcd"
    )
    assert len(first) == 4
    assert "montage.png" in first
    assert first == again
    assert first != other
    assert first != assigned
    image = cv2.imread(str(tmp_path / "a" / min(first)))
    # Two of 128 px, four times as large, beside each other.
    assert image.shape[0] > 512
    assert 1024 <= image.shape[1] < 1100


def test_command_says_mistakes_in_one_line(tmp_path, capsys):
    shapes.write_split("train", 1, tmp_path / "set")
    wrong_classes = ["MODEL.TENSOR_MASK.NUM_CLASSES", "7"]
    assert visualize_data.main([*command(tmp_path / "set", tmp_path), *wrong_classes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Add the override: MODEL.TENSOR_MASK.NUM_CLASSES 6" in error
    (tmp_path / "set" / "images" / "000001.png").write_bytes(b"")
    assert visualize_data.main(command(tmp_path / "set", tmp_path)) == 2
    assert "no image can be read" in capsys.readouterr().err
    assert visualize_data.main([*command(tmp_path / "set", tmp_path), "--num", "0"]) == 2
