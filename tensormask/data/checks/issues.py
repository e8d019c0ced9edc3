"""The kinds of issues of a data set, and how they are counted and reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

NUM_FIRST_IDS = 5
# An id of the file, or the location of an entry without an id, such as "annotations[12]".
Identity = int | str


class IssueKind(NamedTuple):
    """A kind of issue: its meaning, and how the library handles it."""

    meaning: str
    outcome: str
    strict: bool = True  # whether DATASETS.STRICT makes an error of it


_LEFT_OUT = "left out"
_NOT_TRAINED_ON = "not trained on"
_MISSED = "not trained on; when evaluated, its objects count as missed"

# The ids are image ids for image_*, category ids for category_*, annotation ids for all others.
ISSUES = {
    "image_malformed": IssueKind(
        "image without a valid id, file_name, width or height, or of over 268 million pixels",
        _LEFT_OUT,
    ),
    "image_duplicate_id": IssueKind("several entries of one image", "the first is used"),
    "image_ambiguous_id": IssueKind("several images have this id", "all of them are left out"),
    "image_missing": IssueKind("no such file inside the image root", _MISSED),
    "image_broken": IssueKind("the file cannot be read as an image", _MISSED),
    "image_size": IssueKind("the file has another size than the annotations state", _MISSED),
    "category_malformed": IssueKind("category without a valid id or name", _LEFT_OUT),
    "category_duplicate_id": IssueKind("several entries of one category", "the first is used"),
    "category_ambiguous_id": IssueKind(
        "several categories have this id", "all of them are left out"
    ),
    "annotation_malformed": IssueKind(
        "annotation that is not a JSON object, or of an unknown image or category", _LEFT_OUT
    ),
    "annotation_ambiguous": IssueKind(
        "annotation whose image_id or category_id several images or categories have", _LEFT_OUT
    ),
    "annotation_id_type": IssueKind(
        "image_id or category_id is text and the id a number, or the other way round",
        "matched by value",
    ),
    "annotation_duplicate_id": IssueKind("several annotations have this id", "all are used"),
    "iscrowd_malformed": IssueKind("iscrowd is neither 0 nor 1", "0 is used"),
    "area_malformed": IssueKind("area is not a number from 0 to 1e10", "the mask's area is used"),
    "box_malformed": IssueKind(
        "bbox is not four finite numbers, or its width or height is negative", _NOT_TRAINED_ON
    ),
    "box_empty": IssueKind("bbox without area inside the image", _NOT_TRAINED_ON),
    "box_beyond": IssueKind("bbox reaches more than a pixel beyond the image", "clipped"),
    "mask_missing": IssueKind("no segmentation", _NOT_TRAINED_ON),
    "mask_malformed": IssueKind(
        "segmentation is neither polygons nor a valid RLE of the image's size", _NOT_TRAINED_ON
    ),
    "mask_empty": IssueKind("mask without a pixel", _NOT_TRAINED_ON),
    "polygon_malformed": IssueKind(
        "polygon that is not at least three finite points in or near the image",
        "polygon left out; the object too if no polygon remains",
    ),
    "box_mask_disagree": IssueKind(
        "bbox and the extent of the mask differ by more than 2 px and 5 % of the longer side",
        "both are used unchanged",
    ),
    "object_too_small": IssueKind(
        "box or mask is empty at the training size", "left out at that size", strict=False
    ),
}

# Kinds that checkpoints of earlier versions name, and the kinds that include them now.
_FORMER_KINDS = {
    "image_outside_root": "image_missing",
    **dict.fromkeys(
        ("annotation_unknown_image", "annotation_unknown_category"), "annotation_malformed"
    ),
    **dict.fromkeys(("box_not_finite", "box_negative"), "box_malformed"),
    "box_outside": "box_empty",
    **dict.fromkeys(("mask_size", "mask_counts"), "mask_malformed"),
    **dict.fromkeys(
        ("polygon_short", "polygon_odd", "polygon_not_finite", "polygon_far_outside"),
        "polygon_malformed",
    ),
}


def current_kind(name: str) -> str:
    """Return the kind that counts an issue which an older checkpoint calls `name`.

    Example:
        >>> current_kind("polygon_short"), current_kind("image_broken")
        ('polygon_malformed', 'image_broken')
    """
    return _FORMER_KINDS.get(name, name)


class IssueLog:
    """Count the issues of a data set by kind.

    Args:
        kinds: the kinds that exist; those of COCO files by default.

    Attributes:
        counts: number of issues of each kind.
        first_ids: the first few ids of each kind.

    Example:
        >>> log = IssueLog()
        >>> log.add("mask_empty", 7)
        >>> print(log.table().strip())
        1  mask_empty: mask without a pixel; not trained on. Ids: 7
    """

    def __init__(self, kinds: Mapping[str, IssueKind] = ISSUES) -> None:
        self.kinds = kinds
        self.counts: Counter[str] = Counter()
        self.first_ids: dict[str, list[Identity]] = {}
        self._reasons: dict[tuple[str, Identity], str] = {}  # of the first ids only
        self._seen: set[tuple[str, Identity]] = set()

    def add(self, kind: str, identity: Identity, reason: str = "") -> None:
        """Count an issue; `reason` says what exactly is wrong where the kind does not.

        Raises:
            KeyError: the kind does not exist.
        """
        self.kinds[kind]
        self.counts[kind] += 1
        first = self.first_ids.setdefault(kind, [])
        if len(first) < NUM_FIRST_IDS:
            first.append(identity)
            self._reasons[kind, identity] = reason
        self._seen.add((kind, identity))

    def add_new(self, kind: str, identity: Identity) -> bool:
        """Count an issue unless it has been counted; return whether it was new."""
        new = (kind, identity) not in self._seen
        if new:
            self.add(kind, identity)
        return new

    def __len__(self) -> int:
        return sum(self.counts.values())

    def as_record(self) -> dict[str, dict[str, Any]]:
        """Return `{kind: {"count": n, "first_ids": [...]}}` for JSON, in the order of the kinds."""
        return {
            kind: {"count": self.counts[kind], "first_ids": list(self.first_ids[kind])}
            for kind in self.kinds
            if self.counts[kind]
        }

    def table(self) -> str:
        """Return a line per kind: count, name, meaning, outcome, the first ids and reasons."""
        return "\n".join(self.line(kind) for kind in self.as_record())

    def line(self, kind: str) -> str:
        """Return the line of `table` for a kind."""
        first = self.first_ids[kind]
        ids = ", ".join(_described(i, self._reasons.get((kind, i), "")) for i in first)
        more = ", ..." if self.counts[kind] > len(first) else ""
        issue = self.kinds[kind]
        return f"{self.counts[kind]:7d}  {kind}: {issue.meaning}; {issue.outcome}. Ids: {ids}{more}"

    def check_strict(self, name: str) -> None:
        """Raise UserError if the set `name` has an issue that `DATASETS.STRICT` does not allow."""
        if any(self.kinds[kind].strict for kind in self.counts):
            raise UserError(
                f"{name} has issues, and DATASETS.STRICT is on; correct them or switch it off:\n"
                f"{self.table()}"
            )


class IssueReporter:
    """Log the issues of a run's data sets, at the start and as samples show new ones.

    Args:
        logs: the issues of each set by its name; the issues of samples are added to them.
        strict: whether an issue is an error (`DATASETS.STRICT`).

    Raises:
        UserError: a set has issues and `strict` is on.
    """

    def __init__(self, logs: Mapping[str, IssueLog], *, strict: bool) -> None:
        self.logs = dict(logs)
        self.strict = strict
        self._num_recorded = 0
        self._new: list[tuple[str, str, Identity]] = []
        self._num_logged = {name: len(log) for name, log in self.logs.items()}
        for name, log in self.logs.items():
            if log:
                logger.warning("%s has %d issues:\n%s", name, len(log), log.table())
            if strict:
                log.check_strict(name)

    def add(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Count the `issues` of samples, and log the first issue of each kind.

        Raises:
            UserError: a sample has an issue and `strict` is on.
        """
        for name, kind, identity in (issue for sample in samples for issue in sample["issues"]):
            log = self.logs[name]
            first = kind not in log.counts
            if not log.add_new(kind, identity):
                continue
            self._new.append((name, kind, identity))
            if first:
                logger.warning("%s (further ones are counted):\n%s", name, log.line(kind))
            if self.strict:
                log.check_strict(name)

    def wrap(self, loader: Any) -> ReportingLoader:
        """Return a loader of the same batches that passes each batch to `add` first."""
        return ReportingLoader(loader, self)

    def pop_new(self) -> list[tuple[str, str, Identity]]:
        """Return the (set, kind, id) that samples have added since the last call."""
        new, self._new = self._new, []
        return new

    def log_new(self) -> None:
        """Log the table of each set that has issues which no table in the log has yet."""
        for name, log in self.logs.items():
            if len(log) > self._num_logged[name]:
                self._num_logged[name] = len(log)
                logger.warning("%s has %d issues by now:\n%s", name, len(log), log.table())

    def pop_record(self) -> dict[str, Any] | None:
        """Return `{set: {kind: {"count", "first_ids"}}}`, or None if it has not changed."""
        total = sum(map(len, self.logs.values()))
        if total == self._num_recorded:
            return None
        self._num_recorded = total
        return {name: log.as_record() for name, log in self.logs.items() if log}


class ReportingLoader:
    """A loader that adds the issues of its samples to a reporter."""

    def __init__(self, loader: Any, reporter: IssueReporter) -> None:
        self.loader = loader
        self.reporter = reporter

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for samples in self.loader:
            self.reporter.add(samples)
            yield samples


def _described(identity: Identity, reason: str) -> str:
    text = _shortened(repr(identity), 60)
    return f"{text} ({_shortened(reason, 120)})" if reason else text


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
