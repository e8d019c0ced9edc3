"""The windows explorer: its numbers are the model's, up to 4 bits, and people can reach them."""

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from explored import all_masks, inspected, quantised
from torch import Tensor

from tensormask.modeling.inspect import predicted_tensor
from tensormask.visualization import explorer
from tensormask.visualization.html.page import TEMPLATES

pytest.importorskip("jinja2")

LEVELS = [0, 1, 3]


def decoded(tensor: dict) -> Tensor:
    """The logits of an entry of the page's data, (V, U, H, W)."""
    pairs = np.frombuffer(zlib.decompress(base64.b64decode(tensor["codes"])), np.uint8)
    codes = np.stack([pairs >> 4, pairs & 15], 1).ravel()
    shape = tensor["side"], tensor["side"], tensor["height"], tensor["width"]
    logits = torch.tensor(explorer.CODE_LOGITS)[torch.from_numpy(codes.astype(np.int64))]
    return logits[: int(np.prod(shape))].view(shape)


def test_codes_by_hand():
    logits = torch.tensor([-9.0, -0.01, 0.01, 9.0, 0.7])  # p = 0.0001, 0.498, 0.502, 0.9999, 0.668
    codes = explorer.mask_codes(logits)
    assert codes.tolist() == [0, 7, 8, 15, 10]
    packed = zlib.decompress(base64.b64decode(explorer.pack_codes(codes)))
    assert list(packed) == [0x07, 0x8F, 0xA0]


@pytest.mark.parametrize("head", tiny.HEADS)
@torch.no_grad()
def test_every_mask_can_be_computed_from_what_is_stored(head):
    """Entries of the aligned tensor that are left out are of windows outside of the grid."""
    inspection = inspected(head)
    mask_head = inspection.model.mask_head
    for level in LEVELS:
        predicted = quantised(predicted_tensor(mask_head, inspection.features, level, 0))
        stored = decoded(explorer.mask_tensor(inspection, level, 0))
        left_out = float((stored != predicted).float().mean())
        assert (left_out > 0.1) if "bipyramid" in head else (mask_head.aligned or left_out == 0)
        masks = [all_masks(mask_head, level, each) for each in (predicted, stored)]
        torch.testing.assert_close(masks[0], masks[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_scores_and_detections_are_the_models():
    inspection = inspected("aligned")
    data = explorer.explorer_data(inspection, [1, 3], ["a", "b"])
    assert data["classes"] == ["a", "b", "class 2"]
    for level, of_level in zip([1, 3], data["levels"], strict=True):
        scores = inspection.class_scores[level]
        stored = np.frombuffer(zlib.decompress(base64.b64decode(of_level["scores"])), np.uint8)
        expected = scores.flatten().numpy()
        np.testing.assert_allclose(stored / 255, expected, atol=0.5 / 255 + 1e-6)
        assert (of_level["height"], of_level["width"]) == scores.shape[2:]
    found = inspection.detections
    kept = found.select((found.level == 1) | (found.level == 3))
    assert 0 < len(kept.y) < len(found.y)
    assert [d["y"] for d in data["detections"]] == kept.y.tolist()
    assert [[1, 3][d["level"]] for d in data["detections"]] == kept.level.tolist()


def test_the_page_of_the_docs_is_up_to_date():
    """If it is not, make it again: docs/representation.md has the command."""
    page = (Path(__file__).parents[2] / "docs" / "representation_windows.html").read_text("utf-8")
    assert len(page) < 500_000
    for name in ("windows_tensors.js", "windows_views.js", "windows.js"):
        assert (TEMPLATES / name).read_text("utf-8").strip() in page
