"""What can be wrong with a data set: every kind of issue has a name, a count and its first ids."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

NUM_FIRST_IDS = 5
# A number or a string of the file; where there is none, a place in it, such as "annotations[12]".
Identity = int | str


class Issue(NamedTuple):
    """A kind of issue: what it is, and what becomes of what has it."""

    meaning: str
    outcome: str
    strict: bool = True  # whether DATASETS.STRICT makes an error of it


_LEFT_OUT = "left out"
_NOT_TRAINED_ON = "not trained on"
_POLYGON_LEFT_OUT = "polygon left out; the object too if it was the last"
_MISSED = "not trained on; when evaluated, its objects count as missed"

# Those of images have ids of images, those of categories of categories, all others have ids of
# annotations.
ISSUES = {
    "image_malformed": Issue(
        "image without a usable id, file_name, width or height, or of over 268 million pixels",
        _LEFT_OUT,
    ),
    "image_duplicate_id": Issue("image with the id of another one", "the first is taken"),
    "image_outside_root": Issue("file_name leads out of the image root", _MISSED),
    "image_missing": Issue("there is no such file", _MISSED),
    "image_broken": Issue("the file cannot be read as an image", _MISSED),
    "image_size": Issue("the file is of another size than the annotations say", _MISSED),
    "category_malformed": Issue("category without a usable id or name", _LEFT_OUT),
    "category_duplicate_id": Issue("category with the id of another one", "the first is taken"),
    "annotation_malformed": Issue("annotation that is no JSON object", _LEFT_OUT),
    "annotation_duplicate_id": Issue("annotation with the id of another one", "both are kept"),
    "annotation_unknown_image": Issue("there is no image of this image_id", _LEFT_OUT),
    "annotation_unknown_category": Issue("there is no category of this category_id", _LEFT_OUT),
    "iscrowd_malformed": Issue("iscrowd is neither 0 nor 1", "taken for 0"),
    "area_malformed": Issue("area is no number from 0 to 1e10", "the mask's area is taken"),
    "box_malformed": Issue("bbox missing, or not four numbers", _NOT_TRAINED_ON),
    "box_not_finite": Issue("bbox with NaN or infinity", _NOT_TRAINED_ON),
    "box_negative": Issue("bbox of negative width or height", _NOT_TRAINED_ON),
    "box_empty": Issue("bbox of no area", _NOT_TRAINED_ON),
    "box_outside": Issue("bbox wholly outside of the image", _NOT_TRAINED_ON),
    "box_beyond": Issue("bbox reaches more than a pixel out of the image", "clipped"),
    "mask_missing": Issue("no segmentation", _NOT_TRAINED_ON),
    "mask_malformed": Issue("segmentation is neither polygons nor an RLE", _NOT_TRAINED_ON),
    "mask_size": Issue("RLE of another size than its image", _NOT_TRAINED_ON),
    "mask_counts": Issue("RLE whose counts are no code, or do not add up", _NOT_TRAINED_ON),
    "mask_empty": Issue("mask without a pixel", _NOT_TRAINED_ON),
    "polygon_malformed": Issue("polygon that is no list of numbers", _POLYGON_LEFT_OUT),
    "polygon_short": Issue("polygon of fewer than three points", _POLYGON_LEFT_OUT),
    "polygon_odd": Issue("polygon with an x without a y", _POLYGON_LEFT_OUT),
    "polygon_not_finite": Issue("polygon with NaN or infinity", _POLYGON_LEFT_OUT),
    "polygon_far_outside": Issue(
        "polygon more than 16 of the image's longer sides out of it, or more than 512 long",
        _POLYGON_LEFT_OUT,
    ),
    "box_mask_disagree": Issue(
        "bbox and the extent of the mask differ by more than 2 px and 5 % of the longer side",
        "kept, each as it is",
    ),
    "object_too_small": Issue(
        "box or mask is empty at the training size", "left out at that size", strict=False
    ),
}


class IssueLog:
    """Counts the issues of a data set by kind.

    Attributes:
        counts: how many of each kind.
        first_ids: the first few ids of each kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_ids: dict[str, list[Identity]] = {}
        self._seen: set[tuple[str, Identity]] = set()

    def add(self, kind: str, identity: Identity) -> None:
        """Counts an issue.

        Raises:
            KeyError: there is no such kind.
        """
        ISSUES[kind]
        self.counts[kind] += 1
        first = self.first_ids.setdefault(kind, [])
        if len(first) < NUM_FIRST_IDS:
            first.append(identity)
        self._seen.add((kind, identity))

    def add_new(self, kind: str, identity: Identity) -> bool:
        """Counts an issue unless this one has been counted; tells whether it was new."""
        new = (kind, identity) not in self._seen
        if new:
            self.add(kind, identity)
        return new

    def __len__(self) -> int:
        return sum(self.counts.values())

    def as_record(self) -> dict[str, dict[str, Any]]:
        """`{kind: {"count": n, "first_ids": [...]}}` for JSON, in the order of `ISSUES`."""
        return {
            kind: {"count": self.counts[kind], "first_ids": list(self.first_ids[kind])}
            for kind in ISSUES
            if self.counts[kind]
        }

    def table(self) -> str:
        """A line for each kind: count, name, what it is, what becomes of it, and the first ids."""
        return "\n".join(self.line(kind) for kind in self.as_record())

    def line(self, kind: str) -> str:
        """The line of `table` for a kind."""
        ids = ", ".join(map(_shortened, self.first_ids[kind]))
        more = ", ..." if self.counts[kind] > len(self.first_ids[kind]) else ""
        issue = ISSUES[kind]
        return f"{self.counts[kind]:7d}  {kind}: {issue.meaning}; {issue.outcome}. Ids: {ids}{more}"

    def check_strict(self, name: str) -> None:
        """Raises ValueError if a data set has any issue that `DATASETS.STRICT` does not allow."""
        if any(ISSUES[kind].strict for kind in self.counts):
            raise UserError(
                f"{name} has issues, and DATASETS.STRICT is on; correct them or switch it off:\n"
                f"{self.table()}"
            )


class IssueReporter:
    """Says what is wrong with the data sets of a run, at its start and as samples come in.

    Args:
        logs: the issues of each set by its name; what samples bring is added to them.
        strict: whether an issue is an error (`DATASETS.STRICT`).

    Raises:
        ValueError: there are issues and `strict` is on.
    """

    def __init__(self, logs: Mapping[str, IssueLog], *, strict: bool) -> None:
        self.logs = dict(logs)
        self.strict = strict
        self._reported = 0
        self._found: list[tuple[str, str, Identity]] = []
        self._said = {name: len(log) for name, log in self.logs.items()}
        for name, log in self.logs.items():
            if log:
                logger.warning("%s has %d issues:\n%s", name, len(log), log.table())
            if strict:
                log.check_strict(name)

    def take(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds the `issues` of samples, and logs the first of each kind.

        Raises:
            ValueError: there are issues and `strict` is on.
        """
        for name, kind, identity in (issue for sample in samples for issue in sample["issues"]):
            log = self.logs[name]
            first = kind not in log.counts
            if not log.add_new(kind, identity):
                continue
            self._found.append((name, kind, identity))
            if first:
                logger.warning("%s (further ones are counted):\n%s", name, log.line(kind))
            if self.strict:
                log.check_strict(name)

    def watch(self, loader: Iterable[list[Mapping[str, Any]]]) -> _Watched:
        """A loader of the same batches that gives each to `take` on its way."""
        return _Watched(loader, self)

    def pop_found(self) -> list[tuple[str, str, Identity]]:
        """The issues that samples have brought since the last call, each as they name it."""
        found, self._found = self._found, []
        return found

    def log_found(self) -> None:
        """Logs the issues of all sets again, if there are any that the start did not say."""
        for name, log in self.logs.items():
            if len(log) > self._said[name]:
                self._said[name] = len(log)
                logger.warning("%s has %d issues by now:\n%s", name, len(log), log.table())

    def pop_record(self) -> dict[str, Any] | None:
        """`{set: {kind: {"count", "first_ids"}}}`, or None if nothing is new since the last one."""
        total = sum(map(len, self.logs.values()))
        if total == self._reported:
            return None
        self._reported = total
        return {name: log.as_record() for name, log in self.logs.items() if log}


class _Watched:
    """A loader whose batches a reporter sees."""

    def __init__(self, loader: Any, reporter: IssueReporter) -> None:
        self.loader = loader
        self.reporter = reporter

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        for samples in self.loader:
            self.reporter.take(samples)
            yield samples


def _shortened(identity: Identity, limit: int = 60) -> str:
    text = repr(identity)
    return text if len(text) <= limit else text[: limit - 3] + "..."
