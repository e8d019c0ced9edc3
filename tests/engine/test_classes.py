"""Classes of runs: training, test sets, checkpoints and weights, with names in other orders."""

import json
import re

import pytest
from fakes import fake_loader, lines, make_cfg

from tensormask.data import catalog
from tensormask.data.loader import build_train_loader as real_loader
from tensormask.engine import evaluator, run, trainer
from tensormask.engine.resume import load_checkpoint, write_torch

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
NAMES = ["star", "ring", "disc"]


@pytest.fixture
def runs(fakes, monkeypatch, tmp_path):
    """Runs of a fake model on real data sets; `runs.sets` are those that were evaluated."""
    fakes.sets, fakes.classes = [], []

    def evaluate(model, loader, dataset, folder, **options):
        fakes.sets.append(dataset)
        return fakes.results

    def train_loader(cfg, start, *, classes, **options):
        real_loader(cfg, classes=classes)  # its checks
        fakes.classes.append(classes)
        return fake(cfg, start)

    fake = trainer.build_train_loader
    for module in (trainer, evaluator, run):
        monkeypatch.setattr(module, "get_dataset", catalog.get_dataset)
    monkeypatch.setattr(trainer, "build_train_loader", train_loader)
    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    return fakes


def write(path, names, start=1):
    """Write a file with an object of each class, and return the name of the set."""
    box = {"bbox": [2, 2, 9, 9], "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]], "iscrowd": 0}
    ids = range(start, start + len(names))
    path.write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 20} for i in ids],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i, "area": 81, **box} for i in ids
        ],
        "categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)],
    }))  # fmt: skip
    for i in ids:
        (path.parent / f"{i}.png").touch()
    catalog._loaded.clear()
    return f"{path}@{path.parent}"


def config(tmp_path, train, test, *overrides):
    cfg = make_cfg(tmp_path / "out", "MODEL.TENSOR_MASK.NUM_CLASSES", 3, *overrides)
    cfg.merge_from_list([
        *("DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test), "SOLVER.MAX_ITER", 2),
        *("DATALOADER.NUM_WORKERS", 0),
    ])  # fmt: skip
    return cfg


def log(tmp_path):
    return (tmp_path / "out" / "log.txt").read_text()


def test_test_sets_get_the_labels_of_the_training_set(runs, tmp_path):
    train = write(tmp_path / "train.json", NAMES)
    test = write(tmp_path / "test.json", NAMES[::-1], start=5)
    some = write(tmp_path / "some.json", ["disc", "star"])
    averaged = ("SOLVER.EMA.ENABLED", True)
    trainer.train(config(tmp_path, [train], [train, test, some], *averaged))
    assert [s.class_names for s in runs.sets] == [NAMES] * 6
    assert [s.category_ids for s in runs.sets] == [[1, 2, 3], [7, 6, 5], [2, None, 1]] * 2
    assert [s.label_of(s.annotations(1)[0]) for s in (runs.sets[0], runs.sets[2])] == [0, 2]
    assert f"{test} and {train} have their classes in different orders" in log(tmp_path)
    assert f"{some} lacks 1 of the 3 classes of {train}: 'ring'." in log(tmp_path)
    stored = load_checkpoint(tmp_path / "out" / "model_final.pth")
    assert (stored["class_names"], stored["category_ids"]) == (NAMES, [1, 2, 3])

    runs.sets.clear()
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    for resume in (False, True):
        cfg = config(tmp_path, [], [test], *weights, *averaged)
        evaluator.evaluate_only(cfg, resume=resume)
    assert [s.category_ids for s in runs.sets] == [[7, 6, 5]] * 3  # twice with the averages


@pytest.mark.parametrize("how, expected", [("name", NAMES), ("position", ())])
def test_weights_to_train_from_get_the_names(runs, tmp_path, monkeypatch, how, expected):
    train, given = write(tmp_path / "train.json", NAMES), []
    monkeypatch.setattr(
        trainer, "load_weights", lambda model, path, class_names: given.append(class_names)
    )
    opts = ("MODEL.WEIGHTS", "model.pth", "DATASETS.MATCH_CLASSES", how)
    trainer.train(config(tmp_path, [train], [train], *opts))
    assert given == [expected]


@pytest.mark.parametrize(
    "names, message",
    [
        (["star", "ring", "cube"], "'disc'.*only there: 'cube'.*MATCH_CLASSES position"),
        (["star", "ring", "Disc "], "'disc' and 'Disc ' differ only in their spelling"),
        (["star", "ring", "ring"], "Several classes of .*'ring'.*add DATASETS.MATCH_CLASSES"),
        ([*NAMES, "cube"], r"\(4\).*only there: 'cube'.*needs equal numbers"),
    ],
)
def test_other_classes_are_refused(runs, tmp_path, names, message):
    """In a test set of a run and of an evaluation; and a resumed run's training set."""
    train = write(tmp_path / "train.json", NAMES)
    other = write(tmp_path / "other.json", names)
    with pytest.raises(ValueError, match=message):
        trainer.train(config(tmp_path, [train], [train, other]))
    trainer.train(config(tmp_path, [train], [train]))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    for use, options, cfg in [
        (evaluator.evaluate_only, {}, config(tmp_path, [], [other], *weights)),
        (evaluator.evaluate_only, {"resume": True}, config(tmp_path, [], [other])),
        (trainer.train, {"resume": True}, config(tmp_path, [other], [train])),
        (trainer.train, {"resume": True}, config(tmp_path, [train, other], [train])),
    ]:
        cfg.SOLVER.MAX_ITER = 4
        with pytest.raises(ValueError, match=message):
            use(cfg, **options)
    assert len(runs.sets) == 1
    if len(names) == 3:
        by_position = ("DATASETS.MATCH_CLASSES", "position", *weights)
        evaluator.evaluate_only(config(tmp_path, [], [other], *by_position))
        cfg = config(tmp_path, [other], [train], *by_position)
        cfg.SOLVER.MAX_ITER = 4
        trainer.train(cfg, resume=True)
        assert [s.class_names for s in runs.sets[1:]] == [names, NAMES]
        assert runs.classes[-1].names == names
        assert "are matched by position" in log(tmp_path)


def test_a_resumed_run_keeps_its_labels(runs, tmp_path):
    """Also if the training file was exported again and numbers the classes otherwise."""
    train = write(tmp_path / "train.json", NAMES)
    trainer.train(config(tmp_path, [train], [train]))
    train = write(tmp_path / "train.json", ["ring", "disc", "star"], start=4)
    cfg = config(tmp_path, [train], [train])
    cfg.SOLVER.MAX_ITER = 4
    trainer.train(cfg, resume=True)
    assert (runs.classes[-1].names, runs.classes[-1].category_ids) == (NAMES, [6, 4, 5])
    assert runs.sets[-1].category_ids == [6, 4, 5]
    assert "the checkpoint have their classes in different orders" in log(tmp_path)
    stored = load_checkpoint(tmp_path / "out" / "model_final.pth")
    assert (stored["class_names"], stored["category_ids"]) == (NAMES, [6, 4, 5])
    assert len(lines(tmp_path / "out")) == 4

    some = write(tmp_path / "some.json", NAMES[:2])
    with pytest.raises(ValueError, match=r"of the checkpoint \(3\): .*only there: 'disc'"):
        trainer.train(config(tmp_path, [some], [train]), resume=True)
    with pytest.raises(ValueError, match="train_loader has labels of its own"):
        trainer.train(cfg, resume=True, train_loader=[])


def test_weights_without_names_are_matched_by_position(runs, tmp_path):
    train = write(tmp_path / "train.json", NAMES)
    trainer.train(config(tmp_path, [train], [train]))
    path = tmp_path / "out" / "model_final.pth"
    content = load_checkpoint(path)
    del content["class_names"]
    write_torch(path, content)
    other = write(tmp_path / "other.json", ["a", "b", "c"])
    cfg = config(tmp_path, [], [other], "MODEL.WEIGHTS", str(path))
    evaluator.evaluate_only(cfg)
    assert runs.sets[-1].class_names == ["a", "b", "c"]
    assert f"{path} has no class names: they are matched by position" in log(tmp_path)
    some = write(tmp_path / "some.json", ["a", "b"])
    message = r"has 2 classes and the model has 3: .*no class names"
    with pytest.raises(ValueError, match=message) as caught:
        evaluator.evaluate_only(config(tmp_path, [], [some], "MODEL.WEIGHTS", str(path)))
    assert not re.search("NUM_CLASSES 2", str(caught.value))


def test_a_contradicting_number_of_classes(runs, tmp_path):
    """The override that is proposed is the one that works."""
    train = write(tmp_path / "train.json", NAMES)
    some = write(tmp_path / "some.json", NAMES[:2])
    two = ("MODEL.TENSOR_MASK.NUM_CLASSES", 2)
    with pytest.raises(ValueError, match=r"train\.json.* has 3 classes.*NUM_CLASSES 3$"):
        trainer.train(config(tmp_path, [train], [some], *two))
    trainer.train(config(tmp_path, [train], [some]))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    with pytest.raises(ValueError, match=r"model_final\.pth has 3 classes.*NUM_CLASSES 3$"):
        evaluator.evaluate_only(config(tmp_path, [], [some], *two, *weights))
    with pytest.raises(ValueError, match="MATCH_CLASSES must be name or position, got 'id'"):
        trainer.train(config(tmp_path, [train], [some], "DATASETS.MATCH_CLASSES", "id"))


def test_a_run_without_a_training_set_has_the_classes_of_a_test_set(runs, tmp_path):
    some, test = write(tmp_path / "some.json", NAMES[:2]), write(tmp_path / "test.json", NAMES)
    cfg = config(tmp_path, [], [some, test])
    trainer.train(cfg, train_loader=[next(fake_loader(cfg, 0))])
    assert [s.category_ids for s in runs.sets] == [[1, 2, None], [1, 2, 3]]
