#!/usr/bin/env python
"""Make the model that comes with the package from a run: `dev/make_nuclei_model.py RUN`.

RUN is the OUTPUT_DIR of a training on nuclei_dsb2018, or one of its checkpoints. In a folder, it is
`model_best.pth` if there is one, else the averaged weights, else `model_final.pth`. The command

1. rounds the weights to float16 and stores the config beside them, without the paths of the run;
2. measures these weights (`dev/model_card.py`);
3. writes the file, the model card beside it, the row in tensormask/checkpoint/zoo.py, and
   MODEL_ZOO.md.

The same run gives the same bytes, on one machine.
"""

import argparse
import hashlib
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import make_model_zoo
import model_card
import torch
import yaml

from tensormask.checkpoint import zoo
from tensormask.checkpoint.files import get_description, read_checkpoint
from tensormask.commands.convert_weights import convert, round_weights, writer_of
from tensormask.config import CfgNode, get_cfg
from tensormask.config.node import leaves
from tensormask.engine.output_dir import ENVIRONMENT
from tensormask.engine.resume import BEST_CHECKPOINT, FINAL_CHECKPOINT, FINAL_EMA
from tensormask.utils.errors import UserError
from tensormask.utils.files import write_atomically

MAX_BYTES = 5_000_000
FILE_NAME = f"{zoo.PACKAGED}.safetensors"
_ROW = re.compile(
    r"(?<=    _packaged\(  # dev/make_nuclei_model.py writes these lines\n).*?(?=^    \),)",
    re.DOTALL | re.MULTILINE,
)


def find_checkpoint(run: Path) -> Path:
    """Return the checkpoint of a run to publish."""
    if run.is_file():
        return run
    for name in (BEST_CHECKPOINT, FINAL_EMA, FINAL_CHECKPOINT):
        if (run / name).is_file():
            return run / name
    raise UserError(f"{run} has neither {BEST_CHECKPOINT} nor {FINAL_CHECKPOINT}")


def describe_training(path: Path, cfg: CfgNode, content: dict[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint was trained, from it and the file of its run's environment."""
    record = path.parent / ENVIRONMENT
    text = record.read_text(encoding="utf-8") if record.is_file() else ""
    commands = re.findall(r"^command +(.+)$", text, re.MULTILINE)
    commits = re.findall(r"^git +([0-9a-f]{7,40})", text, re.MULTILINE)
    words = shlex.split(commands[0]) if commands else []
    if "train" in words:  # not the paths of Python and of the command
        words = ["tensormask", *words[words.index("train") :]]
    return {
        "command": " ".join(map(quote, words)) or "unknown",
        "commit": commits[-1] if commits else "unknown",
        "iterations": content.get("iteration", -1) + 1,
        "start": Path(cfg.MODEL.WEIGHTS).name or "random weights",
        "parameters": sum(array.numel() for array in content["model"].values()),
    }


def quote(word: str) -> str:
    """Quote a word for a shell, such as "['a.json@images']"."""
    plain = "'" in word and not re.search(r'["$`\\!]', word)
    return f'"{word}"' if plain else shlex.quote(word)


def published_config(cfg: CfgNode) -> str:
    """Return the keys that differ from the defaults as YAML, without those of the run's machine.

    A file without the other keys can be read by a later version that has dropped one of them.
    """
    cfg = cfg.clone()
    defaults = get_cfg()
    for key in ("WEIGHTS", "DEVICE", "COMPILE"):
        cfg.MODEL[key] = defaults.MODEL[key]
    cfg.OUTPUT_DIR, cfg.DATASETS = defaults.OUTPUT_DIR, defaults.DATASETS
    cfg.DATALOADER.NUM_WORKERS = defaults.DATALOADER.NUM_WORKERS
    cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, model_card.MAX_DETS)
    cfg.TEST.EXPECTED_RESULTS = defaults.TEST.EXPECTED_RESULTS
    known = dict(leaves(yaml.safe_load(defaults.dump())))
    tree: dict[str, Any] = {}
    for key, value in leaves(yaml.safe_load(cfg.dump())):
        if value != known[key]:
            *groups, leaf = key.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[leaf] = value
    return yaml.safe_dump(tree, sort_keys=True)


def make_content(path: Path) -> dict[str, Any]:
    """Return the content of the file to publish, without its measurements."""
    content = read_checkpoint(path)
    if "config" not in get_description(content):
        raise UserError(f"{path} contains no config")
    cfg = get_cfg()
    cfg.merge_from_text(content["config"], f"the config in {path}")
    training = describe_training(path, cfg, content)
    content, _ = convert(content, "tensormask", path)
    weights, num_kept = round_weights(content["model"], torch.float16)
    if num_kept:
        print(f"{num_kept} arrays are not rounded: float16 cannot represent them")
    return {
        "model": weights,
        "class_names": content["class_names"],
        "category_ids": content["category_ids"],
        "config": published_config(cfg),
        "about": {"training": training},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file to publish, unless it is too large."""
    size = sum(array.nbytes for array in content["model"].values())
    if size > MAX_BYTES:
        raise UserError(f"{path.name} has {size / 1e6:.2f} MB, the limit is {MAX_BYTES / 1e6:g}")
    write_atomically(path, writer_of(path, content))


def zoo_row(sha256: str, about: dict[str, Any]) -> str:
    """Return the arguments of the row in checkpoint/zoo.py, as lines of Python."""
    measured = about["measured"]["val"]["all"]
    metrics = {"mask AP": measured["AP"], "mask AP@400": measured["AP@400"]}
    metrics |= {"box AP": measured["box AP"]}
    parts = textwrap.wrap(
        about["training"]["command"], 80, break_long_words=False, break_on_hyphens=False
    )
    pieces = [part + " " for part in parts[:-1]] + parts[-1:]
    quoted = [f"            {_quoted(piece)}" for piece in pieces]
    command = _quoted(pieces[0]) if len(pieces) == 1 else "(\n" + "\n".join(quoted) + "\n        )"
    shown = ", ".join(f'"{name}": {value}' for name, value in metrics.items())
    return f'        sha256="{sha256}",\n        metrics={{{shown}}},\n        command={command},\n'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Make the model that comes with the package.")
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of a training, or a file")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write the file and the card there, and change nothing else (default: the package)",
    )
    model_card.add_data_options(parser)
    args = parser.parse_args(arguments)
    path = find_checkpoint(args.run)
    print(f"checkpoint {path}")
    content = make_content(path)
    with tempfile.TemporaryDirectory() as folder:
        unmeasured = Path(folder) / FILE_NAME
        write(unmeasured, content)
        measured, threshold = model_card.measure(unmeasured, args.nuclei, args.photos)
    content["about"]["measured"], content["score_threshold"] = measured, threshold

    output = args.output or zoo.WEIGHTS
    output.mkdir(parents=True, exist_ok=True)
    file = output / FILE_NAME
    write(file, content)
    card = model_card.render(content["about"], threshold)
    (output / model_card.CARD.name).write_text(card, encoding="utf-8")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    row = zoo_row(sha256, content["about"])
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB\n{row}")
    if args.output is None:
        source = Path(zoo.__file__)
        text, num_rows = _ROW.subn(lambda _: row, source.read_text(encoding="utf-8"))
        if num_rows != 1:
            raise UserError(f"{source} has no row of {zoo.PACKAGED} to write: {num_rows} matches")
        source.write_text(text, encoding="utf-8")
        # The table of this process is the old one.
        subprocess.run([sys.executable, make_model_zoo.__file__], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
