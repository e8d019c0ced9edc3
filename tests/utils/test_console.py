"""Consoles and locales that are not UTF-8, and the encodings of files."""

import ast
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from PIL import Image

import tensormask
from tensormask import cli
from tensormask.config import get_cfg
from tensormask.engine.events import LOG, setup_logging
from tensormask.engine.output_dir import ENVIRONMENT, record_environment
from tensormask.utils.errors import UserError

NAMES = ["圆", "长方形", "étoile", "месяц", "🦀", "\udce9"]  # the last one is of a broken file name


every_console = pytest.mark.parametrize(
    "encoding", ["ascii", "cp1252", "cp437", "shift_jis", "utf-8"]
)


def set_console(monkeypatch, encoding):
    """Replace stdout and stderr, and return a function that reads what they hold."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)

    def read() -> str:
        for stream in streams:
            stream.flush()
        return "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return read


def write_set(folder):
    (folder / "图片").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "图片" / "étoile 圆.png")
    image = {"id": 1, "file_name": "étoile 圆.png", "height": 8, "width": 8}
    box = {"image_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    box["segmentation"] = [[1, 1, 5, 1, 5, 5, 1, 5]]
    data = {
        "images": [image, {**image, "id": 2, "file_name": "没有.png"}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)],
        "annotations": [{**box, "id": n, "category_id": n} for n in range(1, len(NAMES) + 1)],
    }
    (folder / "名.json").write_text(json.dumps(data))
    return f"{folder / '名.json'}@{folder / '图片'}"


@every_console
def test_names_in_other_scripts(tmp_path, monkeypatch, encoding):
    console = set_console(monkeypatch, encoding)
    name = write_set(tmp_path)
    assert cli.main(["check", name, "--json", str(tmp_path / "圆.json")]) == 1  # with issues
    output = console()
    for word in NAMES[:5]:
        assert word.encode(encoding, "backslashreplace").decode(encoding) in output, word
    assert cli.main(["check", f"{name}圆"]) == 2
    assert cli.main(["圆"]) == 2
    assert "error: " in console()


@every_console
def test_the_log(tmp_path, encoding, nothing_left_behind, monkeypatch):
    console = set_console(monkeypatch, encoding)
    setup_logging(tmp_path)
    logger = logging.getLogger("tensormask")
    monkeypatch.setattr(logger, "propagate", False)  # pytest-xdist cannot send the last name
    logger.warning("the classes %s", NAMES)
    logger.warning("the classes %s", " ".join(NAMES))
    assert "Logging error" not in console()
    assert "the classes" in console()
    log = (tmp_path / LOG).read_text(encoding="utf-8")
    assert all(name in log for name in NAMES[:5])
    assert r"\udce9" in log
    monkeypatch.setattr(sys, "argv", ["train", *NAMES])
    record_environment(tmp_path)
    assert "étoile" in (tmp_path / ENVIRONMENT).read_text(encoding="utf-8")


def test_a_stream_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_files(tmp_path, monkeypatch, encoding):
    """With and without byte order marks, as of Windows editors and PowerShell."""
    text = f"OUTPUT_DIR: output/圆\n_BASE_: {tmp_path}/é.yaml\n"
    (tmp_path / "a.yaml").write_text(text, encoding=encoding)
    (tmp_path / "é.yaml").write_text("# étoile\nSEED: 5\n", encoding=encoding)
    cfg = get_cfg()
    cfg.merge_from_file(tmp_path / "a.yaml")
    assert (cfg.OUTPUT_DIR, cfg.SEED) == ("output/圆", 5)
    write_set(tmp_path)
    path = tmp_path / "名.json"
    content = json.dumps(json.loads(path.read_text())["images"], ensure_ascii=False)
    data = {"images": json.loads(content), "categories": [{"id": 1, "name": "圆"}]}
    path.write_text(json.dumps(data, ensure_ascii=False), encoding=encoding)
    dataset = tensormask.data.CocoDataset("a", path, tmp_path / "图片")
    assert dataset.class_names == ["圆"]
    assert dataset.has_file.tolist() == [True, False]


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("OUTPUT_DIR: étoile", encoding="cp1252")
    with pytest.raises(UserError, match=r"a\.yaml is not UTF-8 text.*save it as UTF-8"):
        get_cfg().merge_from_file(tmp_path / "a.yaml")


def test_every_file_is_opened_with_an_encoding():
    """Else that of the locale is taken."""
    without = []
    for path in Path(tensormask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and takes_encoding(node):
                if "encoding" not in {keyword.arg for keyword in node.keywords}:
                    without.append(f"{path}:{node.lineno}")
    assert without == []


def takes_encoding(call):
    """Whether a call opens a file as text."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text", "NamedTemporaryFile", "fdopen"):
        return not (isinstance(call.func, ast.Name) and name == "read_text")  # ours
    if name != "open" or getattr(getattr(call.func, "value", None), "id", "") in ("Image", "os"):
        return False
    modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
    return not any("b" in str(mode) for mode in modes)
