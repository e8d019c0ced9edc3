"""README from top to bottom, as a reader runs it: each command and snippet, with short settings.

`tests/test_docs.py` parses the command lines that need COCO or a download.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tensormask.data import get_dataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# An installed package, a GPU, COCO or a download is needed.
NOT_RUN = ("pip install", "tensormask_R_50_FPN")
SHORT = {
    "train": ["SOLVER.MAX_ITER", "4", "DATALOADER.NUM_WORKERS", "0", "TEST.ORACLE_ON", "False"],
}
SNIPPET = "import sys; exec(compile(sys.stdin.read(), 'README.md', 'exec'), {})"


def run(folder: Path, *command: str | Path, text: str = "", code: int = 0) -> str:
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_readme_from_top_to_bottom(tmp_path):
    val = get_dataset("nuclei_val")
    images = Path(val.image_root)
    (tmp_path / "images").symlink_to(images)
    for name in ("train.json", "val.json"):
        (tmp_path / name).symlink_to(images.with_suffix(".json"))
    Image.fromarray(val.load(val.image_ids[0])[0]).save(tmp_path / "image.png")

    num_run = 0
    for language, block in BLOCKS:
        if language == "python":
            run(tmp_path, sys.executable, "-c", SNIPPET, text=block)
            num_run += 1
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if not any(word in line for word in NOT_RUN):
                program, command, *words = shlex.split(line, comments=True)
                assert program == "tensormask", line
                short = SHORT.get(command, [])
                run(tmp_path, sys.executable, "-m", program, command, *words, *short)
                num_run += 1
    assert num_run == 9

    assert len(list((tmp_path / "output/drawings").glob("*.png"))) == len(val)
    assert (tmp_path / "output/predict/image.png").is_file()
    assert (tmp_path / "drawing.png").is_file()
    section = README.partition("A run leaves in its `OUTPUT_DIR`")[2].partition("\n\nA run")[0]
    left = re.findall(r"`([\w./*]+)`", section)
    assert len(left) == 9
    for run_name in ("nuclei", "mine"):
        folder = tmp_path / "output" / run_name
        missing = [name for name in left if not any(folder.glob(name.rstrip("/")))]
        assert missing == [], run_name
