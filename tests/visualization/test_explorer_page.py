"""The page of the windows explorer, in a browser: its views, and how people reach them."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from explored import HEIGHT, WIDTH, all_masks, inspected, quantised

from tensormask.layers import nat2align
from tensormask.modeling.inspect import predicted_tensor
from tensormask.visualization.explorer import write_explorer

# Whether a point of the page is within some pixels of the value.
CLOSE = "{0}.every((number, axis) => Math.abs(number - value[axis]) <= {1})"
CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that writes the page of a head, opens it, and expects no error on it."""
    errors, contexts = [], []

    def open_page(head: str, opts=(), **options):
        inspection = inspected(head, opts)
        rgb = tiny.make_image(HEIGHT, WIDTH).permute(1, 2, 0).numpy()
        levels = range(inspection.model.windows.num_levels)
        path = write_explorer(
            tmp_path / "a.html",
            inspection,
            rgb,
            list(levels),
            class_names=["star", "ring", "</script>"],
            model_name="tiny",
            image_name="<a>.png",
        )
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        requests = []
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.url]
        return page, inspection

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def call(page, function: str, *arguments):
    """Call a function of the page on the tensor of a level and size 0."""
    level, *rest = arguments
    return page.evaluate(
        f"([l, rest]) => [...{function}(data.levels[l], data.levels[l].masks[0], ...rest)]",
        [level, rest],
    )


def becomes(page, condition: str, *values) -> None:
    """Wait until a condition in JavaScript, of a `value`, holds: events may be late."""
    page.wait_for_function(f"([value]) => {condition}", arg=[*values])


def drawn(page) -> None:
    """Wait until the page shows its state."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.mark.parametrize("head", tiny.HEADS)
@torch.no_grad()
def test_the_page_computes_the_models_masks(head, opened):
    page, inspection = opened(head)
    mask_head = inspection.model.mask_head
    for level, window in ((0, [0, 0]), (0, [7, 11]), (1, [4, 12]), (3, [1, 3]), (5, [0, 0])):
        predicted = quantised(predicted_tensor(mask_head, inspection.features, level, 0))
        natural = all_masks(mask_head, level, predicted)[:, :, window[0], window[1]].sigmoid()
        rows = list(range(0, len(natural), 1 + len(natural) // 30))
        columns = rows[1::2]
        shown = torch.tensor(call(page, "naturalMask", level, window, rows, columns))
        expected = natural[rows][:, columns]
        torch.testing.assert_close(shown.view(expected.shape), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["natural", "upscale_natural", "upscale_aligned", "bipyramid"])
@torch.no_grad()
def test_the_page_collects_what_the_windows_around_say(head, opened):
    page, inspection = opened(head)
    mask_head, level, (y, x) = inspection.model.mask_head, 1, (2, 3)
    predicted = quantised(predicted_tensor(mask_head, inspection.features, level, 0))
    aligned = predicted if mask_head.aligned else nat2align(predicted, mask_head.upscale)
    expected = aligned[:, :, y, x].sigmoid().flip(0, 1).flatten().tolist()
    shown = call(page, "alignedView", level, [y, x])
    # NaN, which is null in JSON, where there is no window.
    pairs = [(a, b) for a, b in zip(shown, expected, strict=True) if a is not None and a == a]
    assert len(expected) / 4 < len(pairs) < len(expected)
    for value, of_model in pairs:
        assert value == pytest.approx(of_model, abs=1e-5)


def test_a_mouse_points_and_holds(opened):
    page, _ = opened("bipyramid", viewport={"width": 1600, "height": 900})

    def point(y, x):
        box = page.locator("#image").bounding_box()
        page.mouse.move(box["x"] + x * box["width"] / WIDTH, box["y"] + y * box["height"] / HEIGHT)
        becomes(page, CLOSE.format("state.pixel", 0.5), [y, x])
        drawn(page)
        return page.locator("#window").inner_text()

    page.evaluate("choose(0, 0)")
    assert "row 10 and column 5 of 24 × 32, centered at pixel x 20, y 40" in point(41, 19)
    page.mouse.down()
    page.mouse.up()
    becomes(page, "byId('hold').ariaPressed === 'true'")
    assert "row 10 and column 5" in point(60, 39)  # the window stays, the location moves
    assert page.locator("#natural-value").inner_text() == (
        page.locator("#aligned-value").inner_text()
    )  # lambda is 1 on p2: the same number
    page.locator("h1").hover()
    becomes(page, CLOSE.format("state.pixel", 0.5), [41, 19])


def test_every_number_is_reached_by_keys(opened):
    page, inspection = opened("aligned", viewport={"width": 1000, "height": 900})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "image"
    first = page.evaluate("data.detections[0]")
    state = "[state.level, state.size, ...nearestWindow(data.levels[state.level], state.pixel)]"
    names = ("level", "size", "y", "x")
    assert page.evaluate(state) == [first[name] for name in names]
    page.evaluate("choose(0, 0), moveTo(40, 40)")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowUp")
    assert page.evaluate("state.pixel") == [32, 44]
    page.keyboard.press("]")
    page.keyboard.press("]")
    assert page.evaluate(state) == [1, 0, 4, 6]
    spoken = page.locator("#spoken").inner_text()
    assert "p3, 88 px: the window in row 4 and column 6" in spoken
    best = float(inspection.scores[1][0][4, 6])
    assert f"{100 * best:.0f}\xa0%" in spoken
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(state.replace("state.pixel", "state.held")) == [1, 0, 4, 6]
    page.keyboard.press("Escape")
    assert page.evaluate(state) == [1, 0, 5, 6]
    page.keyboard.press("n")
    second = page.evaluate("data.detections[1]")
    assert page.evaluate(state) == [second[name] for name in names]


def test_a_finger_drags(opened):
    page, _ = opened("natural", viewport={"width": 400, "height": 800}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    box = page.locator("#image").bounding_box()
    x, y = box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"]
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [dict(zip("xy", point, strict=True)) for point in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    for kind, *points in (
        ("touchStart", (x, y)),
        ("touchMove", (x + 0.1 * box["width"], y)),
        ("touchMove", (x + 0.5 * box["width"], y)),
        ("touchEnd",),
    ):
        touch(kind, *points)
    becomes(page, CLOSE.format("state.pixel", 1), [0.25 * HEIGHT, 0.75 * WIDTH])
    pixel = page.evaluate("state.pixel")
    # No tap: right after a drag the browser may take it for a part of a gesture.
    page.get_by_role("button", name="Hold").click()
    becomes(page, "state.held !== null")
    page.touchscreen.tap(x, y)
    assert page.evaluate("state.held") == pytest.approx(pixel, abs=1e-6)


def test_overlays_and_names(opened):
    page, _ = opened("finer_bipyramid")
    pictures = set()
    for name in ("this window’s mask", "windows around", "all scores", "image"):
        page.get_by_role("radio", name=name, exact=True).check()
        drawn(page)
        pictures.add(page.evaluate("stage.toDataURL()"))
    assert len(pictures) == 4
    names = page.locator("canvas:visible:not([aria-hidden])").evaluate_all(
        "all => all.map((canvas) => canvas.ariaLabel)"
    )
    assert len(names) == 4
    assert all(names)
    assert page.get_by_role("radio", name="p4, 240 px").count() == 1
    assert "</script>" in json.dumps(page.evaluate("data.classes"))


def test_without_masks_there_are_scores(opened):
    page, _ = opened("aligned", ["MODEL.MASK_ON", False])
    page.get_by_role("button", name="Next of").click()
    assert "%" in page.locator("#scores").inner_text()
    assert page.locator("#natural").count() == 0


def test_the_page_of_the_docs_opens(browser):
    page = browser.new_page()
    page.goto((Path(__file__).parents[2] / "docs" / "representation_windows.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    page.locator("#image").hover()
    drawn(page)
    assert "centered at pixel x 128, y 128" in page.locator("#window").inner_text()
    page.close()
