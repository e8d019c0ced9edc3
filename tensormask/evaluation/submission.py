"""Files for COCO's evaluation server, which scores sets whose annotations are not public."""

import logging
import re
import shutil
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)


def write_submission(results: Path, dataset_name: str, name: str) -> Path:
    """Writes `detections_<test set>_<name>_results.json` and its zip beside a file of results.

    The server takes results with boxes and masks for both of its tracks. As pycocotools does, it
    then takes the size of a detection from its box, which can move the mask track's AP by size, but
    no other number.

    Args:
        results: a file in COCO's results format.
        dataset_name: see `server_name`.
        name: what the server shall call the method; what has no place in a file name becomes "-".

    Returns:
        The zip, which holds the JSON file and nothing else.
    """
    name = re.sub(r"[^\w.-]+", "-", name)
    json_file = results.with_name(f"detections_{server_name(dataset_name)}_{name}_results.json")
    zip_file = json_file.with_suffix(".zip")
    shutil.copyfile(results, json_file)
    with zipfile.ZipFile(zip_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(json_file, json_file.name)
    logger.info("For the evaluation server: %s (the same in %s)", zip_file, json_file.name)
    return zip_file


def server_name(dataset_name: str) -> str:
    """What the server calls a data set.

    COCO's sets have their year at the end: `coco_2017_test-dev` is `test-dev2017`. A set named by
    its files has the name of its annotations, without `image_info_`; another one its own.
    """
    coco = re.fullmatch(r"coco_(\d{4})_([\w-]+)", dataset_name)
    if coco:
        year, split = coco.groups()
        return f"{split}{year}"
    if ".json@" in dataset_name:
        dataset_name = Path(dataset_name.partition(".json@")[0]).name.removeprefix("image_info_")
    return re.sub(r"[^\w.-]+", "-", dataset_name)
