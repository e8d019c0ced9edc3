"""Write files for COCO's evaluation server, which scores sets without public annotations."""

import logging
import re
import shutil
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)


def write_submission(results: Path, dataset_name: str, name: str) -> Path:
    """Write `detections_<test set>_<name>_results.json` and its zip beside a results file.

    The server accepts results with boxes and masks for both of its tracks. Like pycocotools, it
    then takes the size of a detection from its box, which can change the mask track's APs, APm and
    APl, but no other metric.

    Args:
        results: a file in COCO's results format.
        dataset_name: see `server_name`.
        name: the name of the method; characters that file names cannot contain become "-".

    Returns:
        The path of the zip, which contains only the JSON file.
    """
    name = re.sub(r"[^\w.-]+", "-", name)
    json_file = results.with_name(f"detections_{server_name(dataset_name)}_{name}_results.json")
    zip_file = json_file.with_suffix(".zip")
    shutil.copyfile(results, json_file)
    with zipfile.ZipFile(zip_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(json_file, json_file.name)
    logger.info("File for the evaluation server: %s (contains %s)", zip_file, json_file.name)
    return zip_file


def server_name(dataset_name: str) -> str:
    """Return the server's name of a data set.

    COCO's sets end with the year: `coco_2017_test-dev` is `test-dev2017`. A set given by its files
    has the name of its annotation file, without `image_info_`. Other names are unchanged.
    """
    coco = re.fullmatch(r"coco_(\d{4})_([\w-]+)", dataset_name)
    if coco:
        year, split = coco.groups()
        return f"{split}{year}"
    if ".json@" in dataset_name:
        dataset_name = Path(dataset_name.partition(".json@")[0]).name.removeprefix("image_info_")
    return re.sub(r"[^\w.-]+", "-", dataset_name)
