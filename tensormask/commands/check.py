"""Report the contents and the issues of a data set: `tensormask check SET`.

Nothing is trained, and only the file of --json is written.
"""

import os
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
    read_config,
    write_json,
)
from tensormask.config import CfgNode
from tensormask.data import CocoDataset, get_dataset
from tensormask.data.augmentation import build_test_transform
from tensormask.data.checks.diagnosis import Diagnosis
from tensormask.data.statistics import AREA_LIMITS, Statistics, check_files, count_contents
from tensormask.data.whole_set import diagnose_set, unusable_reason
from tensormask.evaluation.coverage import (
    Coverage,
    input_objects,
    measure_coverage,
    propose_sizes,
)
from tensormask.modeling.build import build_assigner, build_windows
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

NUM_NAMES = 10  # in one line
EXIT_ISSUES = 1


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "check",
        description="Check data sets in COCO's format: their issues, their contents, and which "
        "objects match a window.",
        epilog="The exit code is 0 without issues, 1 with issues, and 2 if nothing of a set can be "
        "used or the command is wrong. "
        "Objects are measured at the size of INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.",
        example="annotations.json@images/ --config-file quickstart INPUT.MIN_SIZE_TEST 384",
    )
    parser.add_argument(
        "sets",
        nargs="+",
        metavar="SET",
        help="a name, such as annotations.json@folder/of/images, coco_2017_val or shapes_train",
    )
    add_config_file(parser, default="Base-TensorMask")
    parser.add_argument("--json", default="", metavar="FILE", help="write all numbers to FILE, too")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="do not open images and rasterize masks: image_broken, image_size and mask_empty of "
        "polygons are not found",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that open images; 0: only this process (default: %(default)s)",
    )
    add_overrides(parser)
    return parser


def check(
    cfg: CfgNode, name: str, *, fast: bool, num_workers: int
) -> tuple[dict[str, Any], list[str]]:
    """Check one data set.

    Returns:
        The findings as a dict for JSON, and as lines to print; "unusable" is the reason why nothing
        of the set can be used, or "".
    """
    dataset = get_dataset(name)
    if not fast:
        with tqdm(total=len(dataset), desc="images", disable=None, leave=False) as progress:
            for num_done in check_files(dataset, num_workers):
                progress.update(num_done)
    diagnoses = diagnose_set(dataset, open_images=not fast)
    statistics = count_contents(dataset)
    windows = build_windows(cfg)
    objects = input_objects(dataset, build_test_transform(cfg))
    assigner = build_assigner(cfg)
    coverage = measure_coverage(objects, windows, assigner)
    proposed, proposed_coverage = propose_sizes(objects, windows, assigner)
    overrides = proposed_overrides(dataset, windows, proposed)
    lines = [
        *describe_diagnoses(diagnoses),
        *describe_contents(statistics),
        *describe_issues(dataset, fast=fast, causes=bool(diagnoses)),
        *describe_coverage(cfg, windows, coverage),
        *describe_proposal(cfg, dataset, windows, coverage, proposed, proposed_coverage),
    ]
    record = {
        "unusable": unusable_reason(dataset, diagnoses),
        "diagnoses": [diagnosis.as_record() for diagnosis in diagnoses],
        "contents": statistics.as_record(),
        "issues": dataset.issues.as_record(),
        "images_opened": not fast,
        "coverage": {"windows": windows.sizes, **coverage.as_record()},
        "proposal": {"overrides": overrides, **proposed_coverage.as_record()},
    }
    return record, lines


def describe_contents(found: Statistics) -> list[str]:
    """Format the numbers of images, annotations and classes."""
    (low, median, high), (left, middle, right) = found.sizes["width"], found.sizes["height"]
    per_image, most = found.objects_per_image
    lines = [
        f"{found.images} images, {found.images_without_objects} of them without objects; "
        f"width {low:.0f} to {high:.0f} px (median {median:g}), "
        f"height {left:.0f} to {right:.0f} px (median {middle:g})",
        f"{found.annotations} annotations: {found.objects} objects with a valid box and mask, "
        f"{found.crowds} crowds, {found.annotations - found.objects - found.crowds} invalid",
        f"{per_image:g} objects an image in the median, {most:.0f} at most",
    ]
    if most > 100:
        lines.append(
            f"  Hint: more than 100: set TEST.DETECTIONS_PER_IMAGE and TEST.MAX_DETS to {most:.0f} "
            "or more."
        )
    for names, what in (
        (found.repeated_names, "Names of several classes"),
        (found.repeated_files, "Files of several images"),
        (dict.fromkeys(found.classes_without_objects, 0), "Classes without objects"),
    ):
        if names:
            lines.append(f"{what}: {_some(list(names))}")
    lines += ["", f"objects by class{'':14}" + "".join(f"{s:>9}" for s in (*AREA_LIMITS, "all"))]
    rows = {name: counts for name, counts in found.by_class.items() if any(counts.values())}
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1].values()))
    for name, counts in [*ordered, ("all", found.by_size)]:
        numbers = [*counts.values(), sum(counts.values())]
        lines.append(f"  {name:28}" + "".join(f"{number:9d}" for number in numbers))
    return lines


def describe_diagnoses(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """Format what is wrong with the set as a whole."""
    return ["The set as a whole:", *(f"  {diagnosis}" for diagnosis in diagnoses), ""] * bool(
        diagnoses
    )


def describe_issues(dataset: CocoDataset, *, fast: bool, causes: bool) -> list[str]:
    """Format the table of issues; `causes` says whether something is wrong with the whole set."""
    opened = "; images were not opened" if fast else ""
    if not dataset.issues:
        return ["", f"No issues{' of single entries' if causes else ''}{opened}."]
    return ["", f"{len(dataset.issues)} issues{opened}:", dataset.issues.table()]


def describe_coverage(cfg: CfgNode, windows: Windows, coverage: Coverage) -> list[str]:
    """Format how many objects match the windows of each level and size, and why others do not."""
    total = coverage.num_objects
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    lines = [
        "",
        f"Windows of the config at INPUT.MIN_SIZE_TEST {shortest}, MAX_SIZE_TEST {longest}: "
        f"{_share(coverage.num_matched, total)} of the objects match a window",
        "  level  window    matched  of the objects     windows",
    ]
    for level, name in enumerate(windows.level_names):
        for size, side in enumerate(windows.sizes[level]):
            matched, num_windows = coverage.objects[level, size], coverage.windows[level, size]
            share = matched / total if total else 0
            lines.append(
                f"  {name:5}  {side:4g} px  {matched:9d}  {share:14.1%}  {num_windows:10d}"
            )
    by_size = (f"{size} {_share(*counts)}" for size, counts in coverage.by_size.items())
    lines += [
        f"  ASSIGNMENT {cfg.MODEL.TENSOR_MASK.ASSIGNMENT}: a matched object has "
        f"{coverage.windows_per_object:.1f} windows on average. Matched by size: "
        + ", ".join(by_size)
    ]
    if coverage.num_matched < total:
        lines.append(f"  Unmatched objects: {total - coverage.num_matched}")
        lines += [f"  {count:7d}  {why}" for why, count in coverage.reasons.items() if count]
    return lines


def describe_proposal(
    cfg: CfgNode,
    dataset: CocoDataset,
    given: Windows,
    coverage: Coverage,
    proposed: Windows,
    proposed_coverage: Coverage,
) -> list[str]:
    """Format the overrides to paste, and what they change."""
    num_classes, configured = len(dataset.class_names), cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    differs = "" if num_classes == configured else f", and {configured} in the config"
    if num_classes < configured:
        differs += " (a set for testing can lack some of the model's)"
    lines = ["", f"Classes: {num_classes}{differs}"]
    if proposed == given:
        lines.append("Windows: those of the config; no tried ones match more objects")
    else:
        total = coverage.num_objects
        lines.append(
            f"Windows, proposed: {_share(proposed_coverage.num_matched, total)} matched, against "
            f"{_share(coverage.num_matched, total)}; {proposed.num_levels} levels, "
            f"against {given.num_levels}"
        )
    if proposed != given or differs:
        lines += ["Overrides:", f"  {proposed_overrides(dataset, given, proposed)}"]
    return lines


def proposed_overrides(dataset: CocoDataset, given: Windows, proposed: Windows) -> str:
    """Return `KEY VALUE` pairs for a shell; those of windows only if they differ."""
    classes = f"MODEL.TENSOR_MASK.NUM_CLASSES {len(dataset.class_names)}"
    if proposed == given:
        return classes
    return (
        f'{classes} MODEL.TENSOR_MASK.IN_FEATURES "{proposed.level_names}" '
        f'MODEL.ANCHOR_GENERATOR.SIZES "{[list(sizes) for sizes in proposed.sizes]}"'
    )


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.2%})" if total else "0 of 0"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    return ", ".join(names[:NUM_NAMES]) + more


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a data set has issues, 2 for a user error.

    A set of which nothing can be used is such an error, too.
    """
    args = build_parser().parse_args(arguments)
    cfg = read_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    records = {}
    for name in args.sets:
        print(f"== {name}")
        records[name], lines = check(cfg, name, fast=args.fast, num_workers=args.num_workers)
        print("\n".join(lines) + "\n")
    write_json(args.json, records)
    if unusable := [record["unusable"] for record in records.values() if record["unusable"]]:
        raise UserError("\n".join(unusable))
    found = any(record["issues"] or record["diagnoses"] for record in records.values())
    return EXIT_ISSUES if found else 0
