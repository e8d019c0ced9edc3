"""The fault log: names, counts, first ids."""

import logging

import pytest

from tensormask.data.faults import FAULTS, FaultLog, FaultReporter


def make_log(**ids_of_kind):
    log = FaultLog()
    for kind, ids in ids_of_kind.items():
        for identity in ids:
            log.add(kind, identity)
    return log


def test_counts_and_first_ids():
    log = make_log(mask_empty=[9], box_empty=[5, 4, "x", 3, 2, 1, 0])
    assert len(log) == 8
    assert log.as_record() == {
        "box_empty": {"count": 7, "first_ids": [5, 4, "x", 3, 2]},
        "mask_empty": {"count": 1, "first_ids": [9]},
    }
    table = log.table().splitlines()
    assert len(table) == 2
    assert "7  box_empty" in table[0]
    assert "Ids: 5, 4, 'x', 3, 2, ..." in table[0]
    assert table[1].endswith("Ids: 9")
    assert FAULTS["mask_empty"].meaning in table[1]


def test_a_known_fault_counts_once():
    log = make_log(box_empty=[5])
    assert not log.add_new("box_empty", 5)
    assert log.add_new("box_empty", 6)
    assert log.add_new("mask_empty", 5)
    assert log.counts == {"box_empty": 2, "mask_empty": 1}


def test_an_unknown_kind_is_a_bug():
    with pytest.raises(KeyError, match="box_ugly"):
        FaultLog().add("box_ugly", 1)


def test_a_long_id_is_shortened():
    assert len(make_log(box_empty=["x" * 10000]).table()) < 300


def test_strict():
    make_log(object_too_small=[1]).check_strict("cells")
    FaultLog().check_strict("cells")
    with pytest.raises(ValueError, match=r"(?s)cells has faults.*STRICT.*box_empty.*Ids: 1, 2"):
        make_log(box_empty=[1, 2]).check_strict("cells")


def sample(*faults):
    return {"image": 0, "faults": list(faults)}


def test_reporter(caplog):
    caplog.set_level(logging.WARNING)
    log, other = make_log(box_empty=[1]), FaultLog()
    reporter = FaultReporter({"cells": log, "other": other}, strict=False)
    assert "cells has 1 faults" in caplog.text
    assert "other" not in caplog.text
    known = {"cells": {"box_empty": {"count": 1, "first_ids": [1]}}}
    assert reporter.pop_record() == known
    assert reporter.pop_record() is None

    caplog.clear()
    broken = ("other", "image_broken", 7)
    reporter.take([sample(), sample(broken, ("other", "image_broken", 8))])
    reporter.take([sample(broken)])
    assert caplog.text.count("image_broken") == 1  # the first of a kind
    assert other.counts == {"image_broken": 2}
    assert reporter.pop_record() == known | {
        "other": {"image_broken": {"count": 2, "first_ids": [7, 8]}}
    }


def test_a_watched_loader_gives_the_same_batches():
    log = FaultLog()
    batches = [[sample(("cells", "image_size", 3))], [sample()]]
    watched = FaultReporter({"cells": log}, strict=False).watch(batches)
    assert len(watched) == 2
    assert list(watched) == batches
    assert log.first_ids == {"image_size": [3]}


def test_a_strict_reporter():
    with pytest.raises(ValueError, match="cells has faults"):
        FaultReporter({"cells": make_log(box_empty=[1])}, strict=True)
    reporter = FaultReporter({"cells": FaultLog()}, strict=True)
    reporter.take([sample(("cells", "object_too_small", 1))])
    with pytest.raises(ValueError, match="image_broken"):
        reporter.take([sample(("cells", "image_broken", 1))])
