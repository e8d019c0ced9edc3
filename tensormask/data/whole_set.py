"""Checks of a data set as a whole: what its files have in common, and whether it can be used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from tensormask.data.checks.annotations import Annotation, is_usable
from tensormask.data.checks.diagnosis import DIAGNOSES, Diagnosis
from tensormask.data.checks.missing_files import explain_missing
from tensormask.data.checks.orientation import (
    Orientations,
    file_size_cause,
    outlines_cause,
    stored_fits_better,
)
from tensormask.data.coco import CocoDataset
from tensormask.data.images import ImageError
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

# Many missing files have one cause, also where others are found.
_MISSING_SHARE, _FEW_MISSING = 0.25, 4
_NUM_HEADERS = 64  # images whose size and EXIF tag are read
_NUM_READ = 500  # images, until one can be read
_TURNED_SHARE, _NUM_TURNED = 0.1, 16  # images with such a tag that are read
_FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "BMP", "GIF")
_ORIENTATION_TAG = 0x0112


def diagnose_set(dataset: CocoDataset, *, open_images: bool = True) -> list[Diagnosis]:
    """Return what is wrong with a set as a whole.

    Args:
        open_images: also read the sizes of some images, and images until one can be read.
    """
    found = list(dataset.diagnoses)
    missing = np.flatnonzero(~dataset.has_file).tolist()
    if len(missing) == len(dataset) or len(missing) >= max(
        _FEW_MISSING, _MISSING_SHARE * len(dataset)
    ):
        names = [dataset.record(i)[0]["file_name"] for i in missing]
        root, json_file = dataset.image_root, dataset.json_file
        detail = explain_missing(root, json_file, names, len(dataset))
        found.append(Diagnosis("images_missing", detail))
    if open_images and dataset.has_file.any():
        indices, files = _read_headers(dataset)
        cause = file_size_cause(files) or _outlines_cause(dataset, indices, files)
        found += [] if cause is None else [Diagnosis(*cause)]
        if (error := _first_error(dataset)) is not None:
            found.append(Diagnosis("images_unreadable", str(error).rstrip(".")))
    return sorted(found, key=lambda diagnosis: list(DIAGNOSES).index(diagnosis.name))


def unusable_reason(dataset: CocoDataset, diagnoses: Sequence[Diagnosis]) -> str:
    """Return why nothing of a set can be used, with its diagnoses, or "" if something can."""
    if not dataset.has_file.any():
        reason = "no image has a file"
    elif any(diagnosis.name == "images_unreadable" for diagnosis in diagnoses):
        reason = "no image can be read with the size that the annotations state"
    elif dataset.has_annotations and not _has_usable_object(dataset):
        reason = "no annotation of an image that has a file can be trained on or evaluated"
    else:
        return ""
    lines = [f"{dataset.name}: {reason}", *map(str, diagnoses), dataset.issues.table()]
    return "\n".join(line for line in lines if line)


def check_sets(datasets: Iterable[CocoDataset], *, strict: bool = False) -> None:
    """Log what is wrong with each set as a whole.

    Raises:
        UserError: nothing of a set can be used, or `strict` is on and something is wrong.
    """
    for dataset in datasets:
        diagnoses = diagnose_set(dataset)
        if reason := unusable_reason(dataset, diagnoses):
            raise UserError(reason)
        lines = "\n".join(map(str, diagnoses))
        if diagnoses and strict:
            raise UserError(
                f"{dataset.name} has issues, and DATASETS.STRICT is on; correct them or switch it "
                f"off:\n{lines}\n{dataset.issues.table()}".strip()
            )
        if diagnoses:
            logger.warning("%s as a whole:\n%s", dataset.name, lines)


def _has_usable_object(dataset: CocoDataset) -> bool:
    in_pixels = "coordinates_normalized" not in {found.name for found in dataset.diagnoses}
    if in_pixels and dataset.num_trainable[dataset.has_file].any():
        return True
    records = map(dataset.record, np.flatnonzero(dataset.has_file).tolist())
    return any(
        is_usable(annotation) and (in_pixels or not _ends_within_a_pixel(annotation))
        for _, annotations in records
        for annotation in annotations
    )


def _ends_within_a_pixel(annotation: Annotation) -> bool:
    """Return whether box or mask are in the first pixel of the image, as those in 0..1 are."""
    box, mask = annotation["bbox"], annotation["segmentation"]
    regions = [box or [], *(mask if isinstance(mask, list) else [])]
    return any(region and max(region) <= 1 for region in regions)


def _first_error(dataset: CocoDataset) -> ImageError | None:
    """Return an error of a set of which no image can be read; images are read until one can."""
    error = None
    indices = np.random.default_rng(0).permutation(np.flatnonzero(dataset.has_file))
    for index in indices[:_NUM_READ].tolist():
        try:
            dataset.load_image(dataset.record(index)[0])
            return None
        except ImageError as failed:
            error = error or failed
    return error


def _outlines_cause(
    dataset: CocoDataset, indices: list[int], files: Orientations
) -> tuple[str, str] | None:
    """Compare the masks of images of an orientation with both forms of the image."""
    turned = [(i, tag) for i, tag in zip(indices, files.tags.tolist(), strict=True) if tag > 1]
    if len(turned) < _TURNED_SHARE * len(indices):
        return None
    fits = []
    for index, tag in turned[:_NUM_TURNED]:
        image, annotations = dataset.record(index)
        try:
            fit = stored_fits_better(dataset.load_image(image), tag, annotations)
        except ImageError:
            continue
        fits += [] if fit is None else [fit]
    return outlines_cause(fits)


def _read_headers(dataset: CocoDataset) -> tuple[list[int], Orientations]:
    """Return sizes of some images, stated and in the file, and their EXIF orientation.

    Returns:
        The indices of the images and what is known of them.
    """
    indices = np.flatnonzero(dataset.has_file)
    if len(indices) > _NUM_HEADERS:
        indices = np.random.default_rng(0).choice(indices, _NUM_HEADERS, replace=False)
    read, stated, stored, tags = [], [], [], []
    Image.init()  # fills Image.OPEN with the formats that this PIL was built with
    formats = [name for name in _FORMATS if name in Image.OPEN]
    for index in indices.tolist():
        image, _ = dataset.record(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(dataset.path(image), formats=formats) as file:
                    size, tag = file.size, file.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # PIL fails in many ways on broken files, which are issues elsewhere
            continue
        read.append(index)
        stated.append((image["height"], image["width"]))
        stored.append(size[::-1])
        tags.append(tag if tag in range(1, 9) else 1)
    return read, Orientations(
        stated=np.array(stated, dtype=np.float64).reshape(-1, 2),
        stored=np.array(stored, dtype=np.float64).reshape(-1, 2),
        tags=np.array(tags, dtype=np.int64),
    )
