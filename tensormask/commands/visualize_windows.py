"""Draw a model's windows: `tensormask visualize windows INPUT --weights FILE`.

Shows which windows fire, and the masks of all windows as two views of one 4D tensor; see
docs/representation.md. With `--html`, it is a page on which every window can be looked at.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from tensormask.checkpoint.downloads import packaged_file
from tensormask.checkpoint.zoo import PACKAGED
from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
    log_to_stderr,
)
from tensormask.data.geometry import transform_image
from tensormask.data.images import read_image
from tensormask.data.transforms import image_to_tensor
from tensormask.layers import paste_masks
from tensormask.modeling.inference import masks_at_windows
from tensormask.modeling.inspect import (
    Inspection,
    aligned_tensor,
    aligned_units,
    natural_masks,
)
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.visualization.explorer import write_explorer
from tensormask.visualization.grid import WHITE, captioned, fit, montage, side_by_side, titled
from tensormask.visualization.instances import (
    DIMMED,
    class_name,
    draw_instances,
    instance_color,
    save_image,
)
from tensormask.visualization.windows import (
    MARK,
    aligned_view,
    grid_through,
    mask_colors,
    natural_view,
    score_view,
    spread,
    window_crop,
)

LEVEL_FILE, OVERVIEW = "level_{}.png", "windows.png"
DEFAULT_OUTPUT, DEFAULT_PAGE = "output/windows", "output/windows.html"
PANEL_SIDE = 512  # pixels: of images and of score maps
TILE_SIDE, MAX_TILES = 64, 8  # of the natural view
SLICE_SIDE, MAX_SLICES = 112, 5  # of the aligned view
CROP_SIDE, MAX_CROPS = 120, 4
MASK_LEGEND = "Red: object. Blue: background. White: undecided."


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "visualize windows",
        description="Draw the sliding windows of a model on an image: their scores, which of them "
        "fire and which are detections after NMS, and their masks in the natural and the aligned "
        "view.",
        epilog="Memory: one level at a time; its aligned tensor takes 4 V U H W bytes, 60 MB for "
        "masks of 15 x 15 on p2 of an image of 800 x 1344 pixels. For such an image the command "
        "takes about 2 GB. A page of --html contains all windows: INPUT.MIN_SIZE_TEST and --levels "
        "make it smaller.",
        example="image.jpg --weights output/quickstart/model_final.pth",
    )
    parser.add_argument("image", nargs="?", metavar="INPUT", help="an image")
    parser.add_argument("--input", metavar="FILE", help="the same")
    add_config_file(parser, default="")
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="a checkpoint, by path, URL or name (default: MODEL.WEIGHTS of --config-file, or "
        f"without one {PACKAGED}, which finds cell nuclei)",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="write one page of HTML, on which the scores, masks and both views of every window "
        "can be looked at (needs the extra 'report')",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"folder for level_p2.png, ... and {OVERVIEW}, or the file of --html (default: "
        f"{DEFAULT_OUTPUT}, {DEFAULT_PAGE})",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="a window fires if the score of its best class is higher (default: %(default)s)",
    )
    parser.add_argument(
        "--levels", metavar="P2,P3", help="levels to draw, such as p2,p4 (default: all)"
    )
    add_overrides(parser)
    return parser


def draw(
    predictor: Predictor, rgb: np.ndarray, levels: list[int], threshold: float, output: Path
) -> None:
    """Draw `rgb`, the network's input, level by level, and print which windows fire."""
    model = predictor.model
    inspection = model.inspect(image_to_tensor(rgb), score_threshold=threshold)
    panels = []
    print(f"level  window  windows  fired  detections  best   (fired: score > {threshold:g})")
    for level in levels:
        name, blocks = model.windows.level_names[level], []
        for size, side in enumerate(model.windows.sizes[level]):
            scores, fired = inspection.scores[level][size], inspection.fired(level, size)
            num_detections = len(inspection.detections_at(level, size).scores)
            counts = f"{scores.numel():8} {len(fired):6} {num_detections:11}"
            print(f"{name:5} {side:4g} px {counts} {float(scores.max()):5.2f}")
            counts = f"{scores.numel()}, of which {len(fired)} fire (white)"
            title = f"{name}, windows of {side:g} px: {counts}; {num_detections} detections (named)"
            panels.append(titled(draw_fired(predictor, inspection, rgb, level, size), title))
            blocks.append(montage([panels[-1], draw_scores(inspection, level, size)], 2))
            if model.mask_head is not None:
                blocks += draw_masks(predictor, model.mask_head, inspection, rgb, level, size)
        save_image(output / LEVEL_FILE.format(name), montage(blocks, 1))
    by_level = montage(panels, model.windows.num_sizes)
    detections = draw_detections(predictor, inspection, rgb)
    save_image(output / OVERVIEW, side_by_side(detections, by_level))


def draw_detections(predictor: Predictor, inspection: Inspection, rgb: np.ndarray) -> np.ndarray:
    """Draw the detections of all levels, like tools/demo.py, but on the network's input."""
    (height, width), masks, found = rgb.shape[:2], None, inspection.detections
    if predictor.model.mask_head is not None:
        (window_masks,) = masks_at_windows(predictor.model.mask_head, inspection.features, [found])
        masks = paste_masks(window_masks, found.windows, (height, width))
    names, num_found = predictor.class_names, len(found.scores)
    drawn = draw_instances(rgb, found.boxes, found.labels, masks, found.scores, names)
    title = f"{width} x {height} px, score > {inspection.threshold:g}: {num_found} detections"
    return titled(fit(drawn, PANEL_SIDE), title)


def draw_fired(
    predictor: Predictor, inspection: Inspection, rgb: np.ndarray, level: int, size: int
) -> np.ndarray:
    """Draw windows on a dark image: those that fire in thin white, those of detections in color."""
    dark = (fit(rgb, PANEL_SIDE) * DIMMED).astype(np.uint8)
    scale, lines = dark.shape[1] / rgb.shape[1], dark.copy()
    fired = window_boxes(predictor.model.windows, level, size, inspection.fired(level, size))
    for x0, y0, x1, y1 in (fired * scale).round().int().tolist():
        cv2.rectangle(lines, (x0, y0), (x1 - 1, y1 - 1), WHITE, 1)
    view = np.asarray(cv2.addWeighted(dark, 0.5, lines, 0.5, 0))
    found, names = inspection.detections_at(level, size), predictor.class_names
    boxes = found.windows * scale
    return draw_instances(view, boxes, found.labels, None, found.scores, names, magnify=1)


def draw_scores(inspection: Inspection, level: int, size: int) -> np.ndarray:
    """Draw the scores of all windows; detections have frames in the colors of `draw_fired`."""
    scores, found = inspection.scores[level][size], inspection.detections_at(level, size)
    # An image without windows that fire stays dark.
    brightest = max(float(scores.max()), inspection.threshold)
    colors = map(instance_color, range(len(found.y)))
    frames = zip(found.y.tolist(), found.x.tolist(), colors, strict=True)
    cell = max(1, PANEL_SIDE // max(scores.shape))
    view = score_view(scores.cpu().numpy(), brightest, cell, frames)
    title = f"Best class's score, (H, W) = {tuple(scores.shape)}; yellow: {brightest:.2f}"
    return titled(view, title)


def draw_masks(
    predictor: Predictor,
    mask_head: MaskHead,
    inspection: Inspection,
    rgb: np.ndarray,
    level: int,
    size: int,
) -> list[np.ndarray]:
    """Draw the two views of a level and size, and the best windows beside their masks."""
    windows, scores = predictor.model.windows, inspection.scores[level][size]
    texts = best_windows(predictor, inspection, level, size)
    best, best_indices = next(iter(texts)), torch.tensor(list(texts))
    rows, columns = grid_through(best, scores.shape, MAX_TILES)
    in_tiles = torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns))
    indices = torch.cat([in_tiles, best_indices])
    logits = natural_masks(mask_head, inspection.features, level, size, indices)
    masks, side, stride = to_probabilities(logits), logits.shape[-1], windows.strides[level]
    tiles = masks[: len(in_tiles)].reshape(len(rows), len(columns), side, side)
    view = natural_view(tiles, rows, columns, TILE_SIDE, {best: MARK})
    captions = [
        "Tile (y, x) is F(:, :, y, x), the mask of the window that is centered at",
        f"pixel ({stride} y, {stride} x). Green: the best window.",
        f"One step of (H, W) is {stride} px, one of (V, U) "
        f"{windows.sizes[level][size] / side:.3g} px.",
        MASK_LEGEND,
    ]
    title = f"Natural view, (V, U, H, W) = {(side, side, *scores.shape)}"
    natural = captioned(titled(view, title), captions)
    pairs = []
    boxes = window_boxes(windows, level, size, best_indices)
    for mask, box, text in zip(masks[len(in_tiles) :], boxes.tolist(), texts.values(), strict=True):
        tile = fit(mask_colors(mask), CROP_SIDE)
        pairs.append(titled(side_by_side(window_crop(rgb, box, len(tile)), tile), text))
    aligned = draw_aligned(windows, mask_head, inspection, level, size, best)
    return [montage([natural, aligned], 2), montage(pairs, MAX_CROPS)]


def draw_aligned(
    windows: Windows,
    mask_head: MaskHead,
    inspection: Inspection,
    level: int,
    size: int,
    best: tuple[int, int],
) -> np.ndarray:
    """Draw slices of the aligned view, and the locations where the window `best` reads them."""
    aligned = aligned_tensor(mask_head, inspection.features, level, size)
    side, chosen = len(aligned), spread(len(aligned), MAX_SLICES)
    slices = to_probabilities(aligned[chosen][:, chosen])
    steps, alpha = aligned_units(mask_head, level)
    offsets = [index - (side - 1) / 2 for index in chosen]
    read_y, read_x = ([steps * i + alpha * offset for offset in offsets] for i in best)
    back = "" if alpha == 1 else f"{alpha:g} "
    captions = [
        "Slice (v, u) is A(v, u, :, :): is location (y, x) on the object of the window",
        f"at (y - {back}v, x - {back}u)? Green: what the best window reads.",
        f"One step of (H, W) is {windows.strides[level] / steps:g} px, one of (V, U) "
        f"{windows.sizes[level][size] / side:.3g} px.",
        MASK_LEGEND,
    ]
    view = aligned_view(slices, (offsets, offsets), SLICE_SIDE, (read_y, read_x))
    title = f"Aligned view, (V, U, H, W) = {tuple(aligned.shape)}"
    return captioned(titled(view, title), captions)


def best_windows(
    predictor: Predictor, inspection: Inspection, level: int, size: int
) -> dict[tuple[int, int], str]:
    """Return titles by index (y, x): of the best detections, else of the best window."""
    scores, found = inspection.scores[level][size], inspection.detections_at(level, size)
    titles: dict[tuple[int, int], str] = {}
    columns = (column.tolist() for column in (found.y, found.x, found.labels, found.scores))
    for y, x, label, score in zip(*columns, strict=True):
        name = class_name(label, predictor.class_names)
        titles.setdefault((y, x), f"y {y} x {x}: {name} {score:.0%}")
    if not titles:
        y, x = divmod(int(scores.argmax()), scores.shape[1])
        titles[y, x] = f"y {y} x {x}: no detection, {float(scores.max()):.0%}"
    return dict(list(titles.items())[:MAX_CROPS])


def window_boxes(windows: Windows, level: int, size: int, indices: Tensor) -> Tensor:
    """Return the boxes (K, 4), in pixels of the network's input, of windows at rows (y, x)."""
    y, x = indices.unbind(1)
    return windows.boxes(torch.full_like(y, level), torch.full_like(y, size), y, x)


def to_probabilities(logits: Tensor) -> np.ndarray:
    return logits.sigmoid().cpu().numpy()


def chosen_levels(names: list[str], text: str | None) -> list[int]:
    """Return the levels in `text`, such as "p2,p4", fine to coarse; all for None."""
    wanted = names if text is None else text.lower().split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        given, known = ", ".join(unknown), ", ".join(names)
        raise UserError(f"--levels: unknown level {given}; the model's levels are {known}")
    return [level for level, name in enumerate(names) if name in wanted]


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.threshold < 1:
        raise UserError(f"--threshold is {args.threshold}; give a score in 0..1, below 1")
    log_to_stderr("%(levelname)s %(message)s")
    image = args.image or args.input
    if not image:
        parser.error("the following arguments are required: INPUT")
    if args.image and args.input:
        raise UserError("give one image, as INPUT or by --input")
    if args.html:
        require("jinja2", extra="report")
    output = Path(args.output or (DEFAULT_PAGE if args.html else DEFAULT_OUTPUT))
    source = args.config_file or args.weights
    weights = args.weights if args.config_file and args.weights else None
    predictor = Predictor(source or packaged_file(), weights, overrides=args.opts)
    names = predictor.model.windows.level_names
    levels = chosen_levels(names, args.levels)
    files = [output / name for name in (OVERVIEW, *(LEVEL_FILE.format(name) for name in names))]
    if any(path.resolve() == Path(image).resolve() for path in [output, *files]):
        raise UserError(f"{image} would be overwritten: give another --output")
    if args.html and output.is_dir():
        raise UserError(f"{output} is a folder: --html writes one file, --output {output}.html")
    rgb = read_image(image)
    geometry = predictor.transform.draw(rgb.shape[:2], np.random.default_rng(0))
    rgb = transform_image(rgb, geometry)
    with torch.inference_mode():
        if args.html:
            model_name = Path(weights or source or PACKAGED).name
            inspection = predictor.model.inspect(
                image_to_tensor(rgb), score_threshold=args.threshold
            )
            write_explorer(
                output,
                inspection,
                rgb,
                levels,
                class_names=predictor.class_names,
                model_name=model_name,
                image_name=Path(image).name,
            )
            print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, open it in a browser")
            return 0
        draw(predictor, rgb, levels, args.threshold, output)
    print(f"{len(levels)} levels and {OVERVIEW} written to {output}")
    return 0
