"""Detect objects and draw them: `python tools/demo.py --config-file C --weights W --input DIR`.

Write a drawing of each image and all detections, in COCO's results format, to --output.
"""

import argparse
import glob
import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from tensormask.commands.common import (
    add_config_file,
    add_overrides,
    exits_on_user_error,
    read_config,
)
from tensormask.data.images import ImageError, read_image
from tensormask.evaluation import coco_results
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.visualization.instances import draw_instances, save_image, unique_stem

logger = logging.getLogger("tensormask.commands.predict")

DETECTIONS_FILE = "detections.json"
EXIT_NOTHING_READ = 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `opts` holds the `KEY VALUE` words."""
    parser = argparse.ArgumentParser(
        description="Detect and draw the objects in images.",
        epilog="KEY VALUE pairs at the end override the config, as in --input a.jpg --output out "
        "MODEL.DEVICE cpu. Put --opts before them if they follow the list of --input.",
    )
    add_config_file(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, folders (without their subfolders) or quoted globs; ** matches subfolders",
    )
    parser.add_argument(
        "--output",
        default="output/demo",
        metavar="DIR",
        help="folder for a PNG per image, named like it (a_2.png for a second a), and "
        f"{DETECTIONS_FILE}: a list of COCO results with image_id (index in the sorted list of "
        "inputs, from 0), category_id, category_name, bbox (x, y, width, height), score, "
        "segmentation (RLE) and file_name (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="checkpoint (default: MODEL.WEIGHTS)"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn and written; the model itself drops detections below "
        "MODEL.TENSOR_MASK.SCORE_THRESH_TEST (default: %(default)s)",
    )
    parser.add_argument(
        "--opts", dest="more_opts", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS
    )
    add_overrides(parser)
    args = parser.parse_args(arguments)
    args.opts += args.more_opts
    return args


def find_images(inputs: list[str]) -> list[Path]:
    """Return the files of `inputs`, sorted and without duplicates.

    A folder gives its files with the suffix of an image format, a glob all files that it matches.
    An input that matches no file is returned unchanged.
    """
    suffixes = Image.registered_extensions()
    files = set()
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files |= {file for file in path.iterdir() if file.suffix.lower() in suffixes}
        elif path.exists():  # before globs: a name may hold brackets
            files.add(path)
        else:
            matches = (Path(match) for match in glob.glob(text, recursive=True))
            files |= {match for match in matches if match.is_file()} or {path}
    return sorted(files)


def process(
    predictor: Predictor, images: list[Path], output: Path, min_score: float
) -> tuple[list[dict[str, Any]], int]:
    """Detect in each image, and draw it to `output`.

    Returns:
        The detections in COCO's results format, and the number of images that cannot be read.

    Raises:
        UserError: a drawing would overwrite an image; nothing has been written.
    """
    taken: set[str] = set()
    drawings = [output / f"{unique_stem(image.stem, taken)}.png" for image in images]
    overwritten = {file.resolve() for file in drawings} & {file.resolve() for file in images}
    if overwritten:
        raise UserError(
            f"drawings would overwrite the images, such as {min(overwritten)}: "
            "give another folder as --output"
        )
    results, num_unread = [], 0
    todo = tqdm(zip(images, drawings, strict=True), total=len(images), disable=None)
    for image_id, (image, drawing) in enumerate(todo):
        try:
            rgb = read_image(image)
        except ImageError as error:
            logger.error(error)
            num_unread += 1
            continue
        detections = predictor(rgb)
        names = detections.pop("class_names")
        # Sorted by score: a slice of the masks, because a copy may take gigabytes.
        num_shown = int((detections["scores"] >= min_score).sum())
        fields = {key: value[:num_shown] for key, value in detections.items()}
        coco = coco_results(fields, image_id, predictor.category_ids)
        for result, name in zip(coco, names[:num_shown], strict=True):
            results.append(result | {"category_name": name, "file_name": str(image)})
        drawn = draw_instances(
            rgb,
            fields["boxes"],
            fields["labels"],
            fields.get("masks"),
            fields["scores"],
            predictor.class_names,
        )
        save_image(drawing, drawn)
    return results, num_unread


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if no image could be read, 2 for a user error."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    images, output = find_images(args.input), Path(args.output)
    predictor = Predictor(read_config(args.config_file, args.opts), args.weights or None)
    results, num_unread = process(predictor, images, output, args.confidence_threshold)
    num_read = len(images) - num_unread
    if num_read:
        (output / DETECTIONS_FILE).write_text(json.dumps(results), encoding="utf-8")
    print(
        f"{len(results)} detections in {num_read} images written to {output}; "
        f"{num_unread} files could not be read"
    )
    return 0 if num_read else EXIT_NOTHING_READ
