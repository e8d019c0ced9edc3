"""The issue log and reporter: kinds, counts, ids, reasons."""

import logging

import pytest

from tensormask.data.checks.issues import ISSUES, IssueLog, IssueReporter, current_kind


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


def test_the_line_gives_the_reason_of_each_id():
    log = IssueLog()
    log.add("polygon_malformed", 3, "fewer than three points")
    log.add("polygon_malformed", 4)
    log.add("polygon_malformed", 5, "NaN or infinity")
    assert log.line("polygon_malformed").endswith(
        "Ids: 3 (fewer than three points), 4, 5 (NaN or infinity)"
    )


# The kinds that versions up to 6e0833d wrote into checkpoints, beside those of today.
FORMER_KINDS = {
    "image_missing": ["image_outside_root"],
    "annotation_malformed": ["annotation_unknown_image", "annotation_unknown_category"],
    "box_malformed": ["box_not_finite", "box_negative"],
    "box_empty": ["box_outside"],
    "mask_malformed": ["mask_size", "mask_counts"],
    "polygon_malformed": [f"polygon_{x}" for x in ("short", "odd", "not_finite", "far_outside")],
}


def test_kinds_of_older_checkpoints_are_counted_under_the_merged_kind():
    for current, formers in FORMER_KINDS.items():
        assert {current_kind(former) for former in formers} == {current}
        assert not set(formers) & set(ISSUES)
    assert [current_kind(kind) for kind in ISSUES] == list(ISSUES)
    assert len(ISSUES) + sum(map(len, FORMER_KINDS.values())) == 36


def test_an_issue_is_counted_once():
    log = make_log(box_empty=[5])
    assert not log.add_new("box_empty", 5)
    assert log.add_new("box_empty", 6)
    assert log.add_new("mask_empty", 5)
    assert log.counts == {"box_empty": 2, "mask_empty": 1}


def test_an_unknown_kind_is_an_error():
    with pytest.raises(KeyError, match="box_ugly"):
        IssueLog().add("box_ugly", 1)


def test_long_ids_and_reasons_are_shortened():
    log = IssueLog()
    log.add("box_empty", "x" * 10000, "y" * 10000)
    assert len(log.table()) < 300


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
    reporter.add([sample(), sample(broken, ("other", "image_broken", 8))])
    reporter.add([sample(broken)])
    assert caplog.text.count("image_broken") == 1  # only the first issue of a kind is logged
    assert other.counts == {"image_broken": 2}
    assert reporter.pop_record() == known | {
        "other": {"image_broken": {"count": 2, "first_ids": [7, 8]}}
    }


def test_log_new_repeats_a_table_only_if_it_has_grown(caplog):
    caplog.set_level(logging.WARNING)
    reporter = IssueReporter({"cells": make_log(box_empty=[1])}, strict=False)
    caplog.clear()
    reporter.log_new()
    assert not caplog.records
    reporter.add([sample(("cells", "image_broken", 7))])
    assert reporter.pop_new() == [("cells", "image_broken", 7)]
    assert reporter.pop_new() == []
    caplog.clear()
    reporter.log_new()
    reporter.log_new()
    assert len(caplog.records) == 1
    assert "cells has 2 issues by now" in caplog.text


def test_a_wrapped_loader_yields_the_same_batches():
    log = IssueLog()
    batches = [[sample(("cells", "image_size", 3))], [sample()]]
    wrapped = IssueReporter({"cells": log}, strict=False).wrap(batches)
    assert len(wrapped) == 2
    assert list(wrapped) == batches
    assert log.first_ids == {"image_size": [3]}


def test_strict_reporter():
    with pytest.raises(ValueError, match=r"(?s)cells has issues.*STRICT.*box_empty.*Ids: 1, 2"):
        IssueReporter({"cells": make_log(box_empty=[1, 2])}, strict=True)
    reporter = IssueReporter({"cells": IssueLog()}, strict=True)
    reporter.add([sample(("cells", "object_too_small", 1))])
    with pytest.raises(ValueError, match="image_broken"):
        reporter.add([sample(("cells", "image_broken", 1))])
