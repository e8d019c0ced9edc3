"""The page of runs: its content, in a browser, and errors of the command."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from grey import GreyDataset, evaluate_found, noisy_case
from run_folders import write_run

from tensormask import cli
from tensormask.report.figures import draw_precision
from tensormask.report.images import choose_images
from tensormask.report.page import _confusion, changed_options
from tensormask.report.runs import Evaluation, read_runs

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two runs that are evaluated on one set with images, the second one also trained."""
    root = tmp_path_factory.mktemp("runs")
    dataset, found = noisy_case(root)
    for image in dataset.to_coco().dataset["images"]:
        grey = np.full((image["height"], image["width"], 3), 90, np.uint8)
        cv2.imwrite(str(root / image["file_name"]), grey)
    named = GreyDataset(dataset.to_coco().dataset, root, f"{root / 'annotations.json'}@{root}")
    write_run(root / "b")
    for name in "ab":
        evaluate_found(found, named, root / name / "inference")
        found = {image_id: {k: v[:1] for k, v in f.items()} for image_id, f in found.items()}
    (root / "b" / "config.yaml").write_text("SOLVER:\n  BASE_LR: 0.0123\n  MAX_ITER: 77\n")
    (root / "b" / "environment.txt").write_text("==== first\nold\n\n==== second\nnumpy <2>\n")
    return [str(root / name) for name in "ab"]


def make(folders: list[str], output: Path, *options: str) -> str:
    assert cli.main(["report", *folders, "--output", str(output), *options]) == 0
    return output.read_text(encoding="utf-8").replace("<wbr>", "")


def test_the_page_of_a_run(folders, tmp_path, capsys):
    html = make(folders[1:], tmp_path / "new" / "b.html", "--images", "2")
    assert f"MB: {tmp_path / 'new' / 'b.html'}" in capsys.readouterr().out
    for text in ("SOLVER.BASE_LR", "0.0123", "numpy &lt;2&gt;", "localization", "AP of masks, %"):
        assert text in html, text
    assert "old" not in html[html.index("Environment") :]
    # 4 curves, of masks and boxes a figure of the means and one by class.
    assert html.count("<svg") == 4 + 4
    assert html.count("data:image/jpeg") == 2 + 2
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert not re.search(r"#[12]0000\d|\bNone\b|\bnan\b", html)


def test_runs_beside_each_other(folders, tmp_path):
    html = make([*folders, folders[0]], tmp_path / "ab.html", "--images", "1")
    assert html.count("data:image/jpeg") == 2 * 2
    table = html[html.index('id="results"') : html.index('id="curves"')]
    (row,) = re.findall(r"AP50 of masks, %</th>(.*)</tr>", table)
    first, second = map(float, re.findall(r"<td>(.*?)</td>", row))
    assert first > second > 0
    assert re.search(r"iterations</th><td>–</td><td>980</td>", table)


def test_options_that_differ(tmp_path):
    """Also from a run that leaves them at the default, but not from one without a config."""
    folders = [write_run(tmp_path / name) for name in "abc"]
    for folder, seed in zip(folders, (7, -1), strict=False):
        (folder / "config.yaml").write_text(f"SOLVER:\n  MAX_ITER: 77\nSEED: {seed}\n")
    assert changed_options(read_runs(folders)) == [
        ("SOLVER.MAX_ITER", ["77", "77", None]), ("SEED", ["7", "-1", None]),
    ]  # fmt: skip
    html = make([*map(str, folders)], tmp_path / "abc.html")
    assert 'class="differs"><th scope="row">SEED' in html
    assert '<tr><th scope="row">SOLVER.MAX_ITER' in html


def test_without_the_data_set_there_are_no_images(folders, tmp_path):
    copy = tmp_path / "a"
    shutil.copytree(folders[0], copy)
    path = copy / "inference" / "evaluation.json"
    path.write_text(re.sub(r'"dataset": "[^"]*"', '"dataset": "not_a_set"', path.read_text()))
    html = make([str(copy)], tmp_path / "a.html")
    assert "data:image" not in html
    assert "the data set is not available here" in html
    assert "Best images" not in make([str(copy)], tmp_path / "a.html", "--images", "0")


def test_a_file_that_is_half_written_is_left_out(folders, tmp_path, caplog):
    shutil.copytree(folders[1], tmp_path / "b")
    path = tmp_path / "b" / "inference" / "precision_recall.json"
    path.write_bytes(path.read_bytes()[:100])
    (run,) = read_runs([tmp_path / "b"])
    assert run.curves
    assert run.evaluations == {}
    assert f"{path.parent} is left out" in caplog.text


def test_names_in_a_figure():
    names = ["_a", "<script>", "#100009", "$x_1$", "x" * 200, "\N{HEBREW LETTER ALEF}", "\n"]
    svg = draw_precision("<b>", {name: [1.0, 0.5] for name in names})
    for name in ("_a", "&lt;script&gt;", "#100009", "$x_1$", "x" * 21 + "...", names[5], r"'\n'"):
        assert f">{name}</text>" in svg, name
    assert "<b>" not in svg


def test_many_classes_are_listed_as_pairs():
    names = [f"class {number}" for number in range(20)]
    of_task = {"by_class": [{"class": name} for name in names], "threshold": 0.5}
    of_task["confusion"] = [[0, 0, 9], [0, 1, 2], [1, 20, 5], [20, 3, 1]]
    confusion = _confusion(Evaluation({"bbox": of_task}, {}, Path()))
    assert confusion["matrix"] == []
    assert confusion["pairs"] == [
        ("class 1", "background", 5), ("class 0", "class 1", 2), ("background", "class 3", 1),
    ]  # fmt: skip


def test_best_and_worst_images_by_the_mean_of_runs():
    runs = [
        Evaluation(
            {"bbox": {"images": [{"image_id": i, "quality": q} for i, q in enumerate(qualities)]}},
            {},
            Path(),
        )
        for qualities in ([0.5, 1.0, None, 0.1], [0.7, 0.1, 0.9, 0.1])
    ]
    assert choose_images(runs, 1) == ([2], [3])
    assert choose_images(runs, 9) == ([2, 0], [3, 1])


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert cli.main(["report", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / folder} has no run: expected metrics.json")
    assert cli.main(["report", str(tmp_path), "--images", "-1"]) == 2


def test_a_config_that_cannot_be_read_any_more(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").write_text("NOT_A_KEY: 1\n")
    (run,) = read_runs([folder])
    assert run.options() == {}
    assert run.config == "NOT_A_KEY: 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_in_a_browser(folders, tmp_path, width, scheme):
    """Nothing is loaded or wrong, images and colors are there, and it fits the window."""
    browsers = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium (Debian's package chromium)")
    make(folders, tmp_path / "ab.html")
    messages: list[str] = []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        size = {"width": width, "height": 800}
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda r: r.url.startswith("data:") or messages.append(r.url))
        page.goto((tmp_path / "ab.html").as_uri())
        assert messages == [(tmp_path / "ab.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 100)")
        line = page.locator("svg path[style*='--c0']").first
        color = line.evaluate("e => getComputedStyle(e).stroke")
        assert color == {"light": "rgb(10, 110, 200)", "dark": "rgb(95, 176, 255)"}[scheme]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[scheme]
        browser.close()
