"""Draw what a model sees: `visualize_windows.py --config-file C --weights W --input IMAGE`.

Which windows fire, and the masks of all of them as two views of one 4D tensor; see
docs/representation.md for the tensor.
"""

import argparse
import logging
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from tensormask.config import get_cfg
from tensormask.data.images import read_image
from tensormask.data.transforms import image_to_tensor, transform_image
from tensormask.layers import paste_masks
from tensormask.modeling import TensorMask
from tensormask.modeling.inference import group_windows, ungroup_masks
from tensormask.modeling.inspect import Seen, aligned_tensor, aligned_units, look, natural_masks
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.visualization.grid import WHITE, captioned, fit, montage, side_by_side, titled
from tensormask.visualization.instances import (
    DIMMED,
    class_name,
    draw_instances,
    instance_colour,
    save_image,
)
from tensormask.visualization.windows import (
    MARK,
    aligned_view,
    grid_through,
    mask_colours,
    natural_view,
    score_view,
    spread,
    window_crop,
)

LEVEL_FILE, OVERVIEW = "level_{}.png", "windows.png"
PANEL_SIDE = 512  # pixels: an image, and a map of scores
TILE_SIDE, MAX_TILES = 64, 8  # of the natural view
MAP_SIDE, MAX_MAPS = 112, 5  # of the aligned view
CROP_SIDE, MAX_CROPS = 120, 4
MASK_LEGEND = "Red: object. Blue: background. White: undecided."
EXIT_MISTAKE = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `opts` holds the `KEY VALUE` words."""
    parser = argparse.ArgumentParser(
        description="Draw the sliding windows of a model on an image: their scores, which of them "
        "fire and are kept by NMS, and their masks in the natural and the aligned view.",
        epilog="KEY VALUE pairs at the end, with or without --opts before them, override the "
        "config. Memory: a level is handled at a time, and its aligned tensor takes 4 V U H W "
        "bytes, 60 MB for masks of 15 x 15 on p2 of an image of 800 x 1344, for which the whole "
        "command takes some 2 GB.",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="checkpoint (default: MODEL.WEIGHTS)"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="an image")
    parser.add_argument(
        "--output",
        default="output/windows",
        metavar="DIR",
        help=f"folder for level_p2.png, ... and {OVERVIEW} (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="a window fires where its best class scores more (default: %(default)s)",
    )
    parser.add_argument(
        "--levels", metavar="P2,P3", help="levels to draw, such as p2,p4 (default: all)"
    )
    parser.add_argument(
        "--opts", dest="more_opts", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.threshold < 1:
        parser.error(f"--threshold is {args.threshold}; give a score in 0..1, below 1")
    args.opts += args.more_opts
    return args


def draw(
    predictor: Predictor, rgb: np.ndarray, levels: list[int], threshold: float, output: Path
) -> None:
    """Draws `rgb`, the network's input, level by level, and prints what fires."""
    model = predictor.model
    seen = look(model, image_to_tensor(rgb), threshold)
    panels = []
    print(f"level  window  windows  fired  detections  best   (fired: score > {threshold:g})")
    for level in levels:
        name, blocks = model.windows.level_names[level], []
        for size, side in enumerate(model.windows.sizes[level]):
            scores, fired = seen.scores[level][size], seen.fired(level, size)
            num_kept = len(seen.kept_at(level, size).scores)
            print(
                f"{name:5} {side:4g} px {scores.numel():8} {len(fired):6} {num_kept:11} "
                f"{float(scores.max()):5.2f}"
            )
            title = (
                f"{name}, windows of {side:g} px: {scores.numel()}, of which {len(fired)} fire "
                f"(white); {num_kept} detections (named)"
            )
            panels.append(titled(draw_fired(predictor, seen, rgb, level, size), title))
            blocks.append(montage([panels[-1], draw_scores(seen, level, size)], 2))
            if model.mask_head is not None:
                blocks += draw_masks(predictor, seen, rgb, level, size)
        save_image(output / LEVEL_FILE.format(name), montage(blocks, 1))
    by_level = montage(panels, model.windows.num_sizes)
    save_image(output / OVERVIEW, side_by_side(draw_detections(predictor, seen, rgb), by_level))


def draw_detections(predictor: Predictor, seen: Seen, rgb: np.ndarray) -> np.ndarray:
    """The detections of all levels, as tools/demo.py draws them, on the network's input."""
    kept, masks = seen.kept, None
    if predictor.model.mask_head is not None:
        groups, positions = group_windows([kept])
        logits = predictor.model.mask_head(seen.features, groups)
        (window_masks,) = ungroup_masks(logits, positions, [kept])
        masks = paste_masks(window_masks, kept.windows, rgb.shape[:2])
    names = predictor.class_names
    drawn = draw_instances(rgb, kept.boxes, kept.labels, masks, kept.scores, names)
    height, width = rgb.shape[:2]
    title = f"{width} x {height} px, score > {seen.threshold:g}: {len(kept.scores)} detections"
    return titled(fit(drawn, PANEL_SIDE), title)


def draw_fired(
    predictor: Predictor, seen: Seen, rgb: np.ndarray, level: int, size: int
) -> np.ndarray:
    """Dark `rgb` with the windows that fire in thin white, those of detections in colour."""
    view = (fit(rgb, PANEL_SIDE) * DIMMED).astype(np.uint8)
    scale, lines = view.shape[1] / rgb.shape[1], view.copy()
    fired = window_boxes(predictor.model, level, size, seen.fired(level, size))
    for x0, y0, x1, y1 in (fired * scale).round().int().tolist():
        cv2.rectangle(lines, (x0, y0), (x1 - 1, y1 - 1), WHITE, 1)
    view = cv2.addWeighted(view, 0.5, lines, 0.5, 0)
    kept, names = seen.kept_at(level, size), predictor.class_names
    return draw_instances(
        view, kept.windows * scale, kept.labels, None, kept.scores, names, magnify=1
    )


def draw_scores(seen: Seen, level: int, size: int) -> np.ndarray:
    """Scores of all windows; those of detections are framed in the colours of `draw_fired`."""
    scores, kept = seen.scores[level][size], seen.kept_at(level, size)
    height, width = scores.shape
    # An image where nothing fires stays dark.
    brightest = max(float(scores.max()), seen.threshold)
    framed = [
        (y, x, instance_colour(number))
        for number, (y, x) in enumerate(zip(kept.y.tolist(), kept.x.tolist(), strict=True))
    ]
    cell = max(1, PANEL_SIDE // max(height, width))
    view = score_view(scores.cpu().numpy(), brightest, cell, framed)
    return titled(view, f"Best class's score, (H, W) = {height, width}; yellow: {brightest:.2f}")


def draw_masks(
    predictor: Predictor, seen: Seen, rgb: np.ndarray, level: int, size: int
) -> list[np.ndarray]:
    """The two views of a level and size, and the best windows beside their masks."""
    model, shape = predictor.model, tuple(seen.scores[level].shape[1:])
    texts = best_windows(predictor, seen, level, size)
    best, places = next(iter(texts)), torch.tensor(list(texts))
    rows, columns = grid_through(best, shape, MAX_TILES)
    grid = torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns))
    logits = natural_masks(model.mask_head, seen.features, level, size, torch.cat([grid, places]))
    masks, side = to_probabilities(logits), logits.shape[-1]

    stride = model.windows.strides[level]
    tiles = masks[: len(grid)].reshape(len(rows), len(columns), side, side)
    view = natural_view(tiles, rows, columns, TILE_SIDE, {best: MARK})
    captions = [
        "Tile (y, x) is F(:, :, y, x), the mask of the window that is centred at",
        f"pixel ({stride} y, {stride} x). In green the best window.",
        f"One step of (H, W) is {stride} px, one of (V, U) "
        f"{model.windows.sizes[level][size] / side:.3g} px.",
        MASK_LEGEND,
    ]
    title = f"Natural view, (V, U, H, W) = {(side, side, *shape)}"
    natural = captioned(titled(view, title), captions)
    pairs = []
    boxes = window_boxes(model, level, size, places)
    for mask, box, text in zip(masks[len(grid) :], boxes.tolist(), texts.values(), strict=True):
        tile = fit(mask_colours(mask), CROP_SIDE)
        pairs.append(titled(side_by_side(window_crop(rgb, box, len(tile)), tile), text))
    aligned = draw_aligned(model, seen, level, size, best)
    return [montage([natural, aligned], 2), montage(pairs, MAX_CROPS)]


def draw_aligned(
    model: TensorMask, seen: Seen, level: int, size: int, best: tuple[int, int]
) -> np.ndarray:
    """Maps of offsets on a coarse grid, and where the window `best` reads in them."""
    aligned = aligned_tensor(model.mask_head, seen.features, level, size)
    side, chosen = len(aligned), spread(len(aligned), MAX_MAPS)
    maps = to_probabilities(aligned[chosen][:, chosen])
    steps, alpha = aligned_units(model.mask_head, level)
    offsets = [index - (side - 1) / 2 for index in chosen]
    read = [[steps * place + alpha * offset for offset in offsets] for place in best]
    back = "" if alpha == 1 else f"{alpha:g} "
    texts = [
        "Map (v, u) is A(v, u, :, :): is place (y, x) of the object of the window",
        f"at (y - {back}v, x - {back}u)? In green what the best window reads.",
        f"One step of (H, W) is {model.windows.strides[level] / steps:g} px, one of (V, U) "
        f"{model.windows.sizes[level][size] / side:.3g} px.",
        MASK_LEGEND,
    ]
    view = aligned_view(maps, (offsets, offsets), MAP_SIDE, read)
    return captioned(titled(view, f"Aligned view, (V, U, H, W) = {tuple(aligned.shape)}"), texts)


def best_windows(
    predictor: Predictor, seen: Seen, level: int, size: int
) -> dict[tuple[int, int], str]:
    """Places (y, x) of the best detections, or else of the best window, and what to say of them."""
    scores, kept = seen.scores[level][size], seen.kept_at(level, size)
    found = {}
    columns = (column.tolist() for column in (kept.y, kept.x, kept.labels, kept.scores))
    for y, x, label, score in zip(*columns, strict=True):
        name = class_name(label, predictor.class_names)
        found.setdefault((y, x), f"y {y} x {x}: {name} {score:.0%}")
    if not found:
        y, x = divmod(int(scores.argmax()), scores.shape[1])
        found[y, x] = f"y {y} x {x}: no detection, {float(scores.max()):.0%}"
    return dict(list(found.items())[:MAX_CROPS])


def window_boxes(model: TensorMask, level: int, size: int, places: Tensor) -> Tensor:
    """Boxes (K, 4) in pixels of the network's input of the windows at rows (y, x)."""
    y, x = places.unbind(1)
    return model.windows.boxes(torch.full_like(y, level), torch.full_like(y, size), y, x)


def to_probabilities(logits: Tensor) -> np.ndarray:
    return logits.sigmoid().cpu().numpy()


def chosen_levels(names: list[str], text: str | None) -> list[int]:
    """The levels that `text` names, such as "p2,p4", fine to coarse; all for None.

    Raises:
        ValueError: there is no such level.
    """
    wanted = names if text is None else text.lower().split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise UserError(
            f"--levels: there is no {', '.join(unknown)}; the model's levels are {', '.join(names)}"
        )
    return [level for level, name in enumerate(names) if name in wanted]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 2 for a user's mistake."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    output = Path(args.output)
    try:
        cfg = get_cfg()
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        predictor = Predictor(cfg, args.weights or None)
        names = predictor.model.windows.level_names
        levels = chosen_levels(names, args.levels)
        for name in (OVERVIEW, *(LEVEL_FILE.format(name) for name in names)):
            if (output / name).resolve() == Path(args.input).resolve():
                raise UserError(f"{args.input} would be overwritten: give another --output")
        rgb = read_image(args.input)
        geometry = predictor.transform.draw(rgb.shape[:2], np.random.default_rng(0))
        with torch.inference_mode():
            draw(predictor, transform_image(rgb, geometry), levels, args.threshold, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    print(f"{len(levels)} levels and {OVERVIEW} written to {output}")
    return 0
