"""The issue log: names, counts, first ids."""

import logging

import pytest

from tensormask.data.checks.issues import ISSUES, IssueLog, IssueReporter


def make_log(**ids_of_kind):
    log = IssueLog()
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
    assert ISSUES["mask_empty"].meaning in table[1]


def test_a_known_issue_counts_once():
    log = make_log(box_empty=[5])
    assert not log.add_new("box_empty", 5)
    assert log.add_new("box_empty", 6)
    assert log.add_new("mask_empty", 5)
    assert log.counts == {"box_empty": 2, "mask_empty": 1}


def test_an_unknown_kind_is_a_bug():
    with pytest.raises(KeyError, match="box_ugly"):
        IssueLog().add("box_ugly", 1)


def test_a_long_id_is_shortened():
    assert len(make_log(box_empty=["x" * 10000]).table()) < 300


def test_strict():
    make_log(object_too_small=[1]).check_strict("cells")
    IssueLog().check_strict("cells")
    with pytest.raises(ValueError, match=r"(?s)cells has issues.*STRICT.*box_empty.*Ids: 1, 2"):
        make_log(box_empty=[1, 2]).check_strict("cells")


def sample(*issues):
    return {"image": 0, "issues": list(issues)}


def test_reporter(caplog):
    caplog.set_level(logging.WARNING)
    log, other = make_log(box_empty=[1]), IssueLog()
    reporter = IssueReporter({"cells": log, "other": other}, strict=False)
    assert "cells has 1 issues" in caplog.text
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
    log = IssueLog()
    batches = [[sample(("cells", "image_size", 3))], [sample()]]
    watched = IssueReporter({"cells": log}, strict=False).watch(batches)
    assert len(watched) == 2
    assert list(watched) == batches
    assert log.first_ids == {"image_size": [3]}


def test_a_strict_reporter():
    with pytest.raises(ValueError, match="cells has issues"):
        IssueReporter({"cells": make_log(box_empty=[1])}, strict=True)
    reporter = IssueReporter({"cells": IssueLog()}, strict=True)
    reporter.take([sample(("cells", "object_too_small", 1))])
    with pytest.raises(ValueError, match="image_broken"):
        reporter.take([sample(("cells", "image_broken", 1))])
