"""Tiles, and detections joined across their seams, with drawn objects and exact masks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tensormask.evaluation.cropped import CroppedMask, CroppedMasks, Region, unite
from tensormask.evaluation.results import coco_results
from tensormask.evaluation.seams import TileGrid, TileJoiner
from tensormask.utils.errors import UserError


def detect(objects, tile, seed=0):
    """What an exact model finds in a tile of labeled pixels: an object a number, as class 0."""
    numbers = np.unique(objects[tile.y0 : tile.y1, tile.x0 : tile.x1])
    numbers = np.random.default_rng(seed).permutation(numbers[numbers > 0])
    masks = [objects[tile.y0 : tile.y1, tile.x0 : tile.x1] == number for number in numbers]
    crops = [CroppedMask(0, 0, mask) for mask in masks]
    boxes = torch.tensor([crop.extent for crop in crops]).view(-1, 4).float()
    return {
        "boxes": boxes,
        "scores": torch.linspace(0.9, 0.5, len(crops)),
        "labels": torch.zeros(len(crops), dtype=torch.int64),
        "windows": boxes,
        "window_masks": [torch.from_numpy(crop.array()).float() for crop in crops],
    }


def join(objects, tile, overlap, change=lambda number, detection: detection, **options):
    grid = TileGrid(objects.shape, tile, overlap)
    joiner = TileJoiner(grid, **options)
    for number, region in enumerate(grid.tiles):
        joiner.add(number, change(number, detect(objects, region, number)))
    return joiner.join()


def found(objects, detection):
    """The objects that come out whole, and how many detections there are."""
    whole = []
    for x0, y0, region in detection["window_masks"].regions():
        inside = objects[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]]
        (number,) = np.unique(inside[region.numpy()])
        if (objects == number).sum() == region.sum():
            whole.append(int(number))
    return sorted(whole), len(detection["scores"])


def is_whole(objects, detection):
    numbers = [int(number) for number in np.unique(objects) if number]
    return found(objects, detection) == (numbers, len(numbers))


def disc(objects, x, y, radius, number=None):
    ys, xs = np.ogrid[: objects.shape[0], : objects.shape[1]]
    inside = (xs - x) ** 2 + (ys - y) ** 2 <= radius**2
    objects[inside & (objects == 0)] = number or objects.max() + 1


def test_tiles_of_one_size_cover_the_image():
    """Of 8 pixels with tiles of 4 that overlap by 1: starts 0, 2, 4, not 0, 3 and a part."""
    assert [tile.x0 for tile in TileGrid((4, 8), 4, 1).tiles] == [0, 2, 4]
    assert TileGrid((3, 9), 20, 5).tiles == [(0, 0, 9, 3)]  # an image smaller than a tile
    for length in range(10, 60):
        starts = [tile.x0 for tile in TileGrid((1, length), 10, 3).tiles]
        assert starts[0] == 0
        assert starts[-1] == length - 10
        assert all(0 < b - a <= 7 for a, b in pairwise(starts))
    grid = TileGrid((4, 10), 6, 2)
    assert [grid.owner(Region(x, 0, x + 1, 1)) for x in range(10)] == [0] * 5 + [1] * 5
    assert grid.depth(0, Region(1, 0, 4, 4)) == 2  # the image's border is no inner one
    for tile, overlap in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(UserError, match=r"overlap|tile"):
            TileGrid((8, 8), tile, overlap)


def test_neighbors_are_the_overlapping_tiles():
    grid = TileGrid((50, 95), 40, 20)  # evenly spread: some overlap the next but one
    for number, tile in enumerate(grid.tiles):
        earlier = [n for n in range(number) if grid.tiles[n] & tile]
        assert list(grid.neighbors(number)) == earlier


def test_a_seam_through_one_object():
    """In tiles 0..6 and 4..10, an object of 8 pixels is longer than the overlap: one, whole."""
    objects = np.zeros((4, 10), int)
    objects[1:3, 1:9] = 1
    detection = join(objects, 6, 2)
    assert detection["boxes"].tolist() == [[1, 1, 9, 3]]
    assert detection["windows"].tolist() == [[1, 1, 9, 3]]
    assert detection["window_masks"][0].tolist() == [[True] * 8] * 2


# A seam is the overlap 40..60 of tiles of 60 pixels in an image of 100.
@pytest.mark.parametrize("radius", [2, 9, 25])
@pytest.mark.parametrize("at", [(38, 20), (40, 21), (50, 50), (59, 60), (47, 43), (61, 40)])
def test_discs_at_seams_and_corners(radius, at):
    for x, y in (at, at[::-1]):
        objects = np.zeros((100, 100), int)
        disc(objects, x, y, radius)
        assert is_whole(objects, join(objects, 60, 20))


@pytest.mark.parametrize("size", [(100, 100), (97, 131), (60, 200), (45, 45), (61, 75)])
def test_random_discs_that_touch(size):
    """None twice, none cut, and no two joined; also where one is in a hole of the other."""
    rng = np.random.default_rng(size[1])
    for _ in range(3):
        objects = np.zeros(size, int)
        for radius in (3, 30, 14, 10, 7, 7, 5, 5, 3, 3, 3, 2, 2, 1):
            disc(objects, rng.integers(size[1]), rng.integers(size[0]), radius)
        for overlap in (0, 1, 8, 24):
            if overlap:
                assert is_whole(objects, join(objects, 50, overlap))
            else:  # nothing can be joined without pixels that both tiles see
                assert len(join(objects, 50, 0)["scores"]) >= objects.max()


def test_long_objects_over_many_tiles_and_a_chain_of_neighbors():
    objects = np.zeros((60, 300), int)
    objects[5:9] = 1  # through all tiles
    objects[20:50, 10:12] = 2
    for number in range(14):  # a chain, each touching the next
        objects[25:35, 20 + number * 20 : 40 + number * 20] = 3 + number
    assert is_whole(objects, join(objects, 50, 12))
    assert is_whole(objects.T.copy(), join(objects.T.copy(), 50, 12))


def noisy(number, detection):
    """Masks a pixel too wide on one side and boxes of a rounding error: the views disagree."""
    if number % 2:
        detection["windows"] = detection["windows"] + torch.tensor([0.0, 0, 1, 0])
    return detection


def test_views_that_disagree_by_a_pixel_are_one_object():
    objects = np.zeros((60, 100), int)
    for x, y, radius in ((50, 12, 8), (45, 40, 16), (20, 20, 8), (80, 40, 8)):
        disc(objects, x, y, radius)
    detection = join(objects, 60, 20, noisy)
    assert len(detection["scores"]) == 4
    for _, _, region in detection["window_masks"].regions():
        assert region.any()


def test_what_the_tile_of_the_core_does_not_find_is_dropped():
    """The view near a border is worse; a detection that reaches beyond the other tile remains."""
    objects = np.zeros((20, 100), int)  # tiles 0..60 and 40..100, cores meet at 50
    disc(objects, 43, 5, 2)  # of tile 0
    disc(objects, 56, 14, 2)  # of tile 1
    objects[10:12, 45:70] = 3  # of tile 1, and cut in tile 0
    objects[17:19, 30:70] = 4  # cut in both, and inside of none

    def only(tile):
        return lambda number, detection: detection if number == tile else detect(objects * 0, ALL)

    assert found(objects, join(objects, 60, 20, only(0))) == ([1], 2)
    assert found(objects, join(objects, 60, 20, only(1))) == ([2, 3], 3)


ALL = Region(0, 0, 1, 1)


def test_classes_are_joined_if_they_need_not_agree():
    objects = np.zeros((20, 100), int)
    objects[4:9, 20:90] = 1

    def other_class(number, detection):
        return detection | {
            "labels": detection["labels"] + number,
            "scores": detection["scores"] * (0.5 if number else 1),
        }

    assert len(join(objects, 60, 20, other_class)["scores"]) == 2
    detection = join(objects, 60, 20, other_class, class_agnostic=True)
    assert detection["labels"].tolist() == [0]  # of the better score
    assert detection["scores"].tolist() == pytest.approx([0.9])


def test_boxes_are_joined_without_masks():
    objects = np.zeros((20, 100), int)
    objects[4:9, 20:90] = 1
    objects[12:16, 42:58] = 2

    def boxes_only(number, detection):
        return {name: detection[name] for name in ("boxes", "scores", "labels")}

    detection = join(objects, 60, 20, boxes_only)
    assert sorted(detection) == ["boxes", "labels", "scores"]
    assert sorted(detection["boxes"].tolist()) == [[20, 4, 90, 9], [42, 12, 58, 16]]


def test_cropped_masks():
    """Rows, unions and COCO's results equal those of whole masks."""
    rng = np.random.default_rng(0)
    dense = rng.random((5, 20, 30)) > 0.6
    dense[:, :, :3] = dense[:, 17:] = dense[4] = False
    masks = [CroppedMask(0, 0, mask) for mask in dense]
    assert masks[4].extent == (0, 0, 0, 0)
    for a, whole in zip(masks, dense, strict=True):
        assert a.area == whole.sum()
        for b, other in zip(masks, dense, strict=True):
            assert a.overlap(b) == (whole & other).sum()
        for region in (Region(0, 0, 30, 20), Region(5, 6, 11, 9), Region(-2, 15, 50, 22)):
            x0, y0, x1, y1 = region
            assert a.area_within(region) == whole[y0:y1, max(x0, 0) : x1].sum()
    both = unite(masks[:2]).within(Region(0, 0, 30, 20))
    np.testing.assert_array_equal(both, dense[0] | dense[1])

    cropped = CroppedMasks(masks[:4])
    assert len(cropped[1:3]) == len(cropped[torch.tensor([True, False, True, False])]) == 2
    assert torch.equal(cropped[torch.tensor([2, 0])][1], cropped[0])
    fields = {
        "boxes": cropped.extents.float(),
        "scores": torch.full((4,), 0.5),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    windows = {"windows": cropped.extents, "window_masks": cropped}
    as_dense = coco_results(fields | {"masks": torch.from_numpy(dense[:4])}, 1, [1], (20, 30))
    assert coco_results(fields | windows, 1, [1], (20, 30)) == as_dense
