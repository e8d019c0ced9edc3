"""Overlap of objects: which detections match the ground truth, and which ones claim one object.

Boxes are arrays `(K, 4)`, xyxy in pixels, and masks are bool arrays `(K, H, W)` or None.
"""

from collections.abc import Sequence

import numpy as np

MATCH_IOU = 0.5
DUPLICATE_IOU = 0.8


def mask_extents(masks: np.ndarray) -> np.ndarray:
    """Return the smallest boxes around masks, int `(K, 4)` xyxy; zeros for an empty mask."""
    extents = np.zeros((len(masks), 4), int)
    for extent, mask in zip(extents, masks, strict=True):
        rows = np.flatnonzero(mask.any(1))
        if len(rows):
            columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(0))
            extent[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return extents


def box_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Return the IoU `(A, B)` of boxes; 0 where a box is empty or not finite.

    Example:
        >>> box_iou(np.array([[0, 0, 2, 1]]), np.array([[1, 0, 3, 1], [0, 0, 2, 1]])).round(2)
        array([[0.33, 1.  ]])
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
        high = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
        shared = np.clip(high - low, 0, None).prod(2)
        areas_a, areas_b = (
            np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1) for boxes in (boxes_a, boxes_b)
        )
        union = areas_a[:, None] + areas_b - shared
        return np.nan_to_num(np.divide(shared, union, out=np.zeros(union.shape), where=union > 0))


def match(
    boxes: np.ndarray, masks: np.ndarray | None, gt_boxes: np.ndarray, gt_masks: np.ndarray | None
) -> np.ndarray:
    """Match K detections, best first, to M ground-truth objects of any class.

    Each takes the remaining object with the highest IoU, which must be 0.5 or more. The IoU is that
    of the masks; where one of the two has no mask or an empty one, it is that of the boxes.

    Returns:
        int `(K,)`: row of the matched object, or -1.
    """
    iou = box_iou(boxes, gt_boxes)
    if masks is not None and gt_masks is not None:
        extents, gt_extents = mask_extents(masks), mask_extents(gt_masks)
        both = extents[:, None, 2:].all(2) & gt_extents[None, :, 2:].all(2)
        iou[both] = 0
        for row, gt_row in np.argwhere(both & (box_iou(extents, gt_extents) > 0)):
            iou[row, gt_row] = _mask_iou(
                masks[row], extents[row], gt_masks[gt_row], gt_extents[gt_row]
            )
    matched = np.full(len(boxes), -1)
    for row in range(len(boxes) if len(gt_boxes) else 0):
        best = iou[row].argmax()
        if iou[row, best] >= MATCH_IOU:
            matched[row] = best
            iou[:, best] = 0
    return matched


def group_duplicates(
    order: Sequence[int],
    labels: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None,
    extents: np.ndarray | None,
) -> list[list[int]]:
    """Group rows of different classes that claim one object: IoU of boxes and of masks >= 0.8.

    Args:
        order: the rows from the best to the worst; the first row of a group is its best.
        extents: `mask_extents(masks)`.

    Returns:
        Rows of each group, in the order of their first rows.
    """
    close = box_iou(boxes, boxes) >= DUPLICATE_IOU
    groups: dict[int, list[int]] = {}
    for row in order:
        for best in np.flatnonzero(close[row]).tolist():
            group = groups.get(best, [])
            if not group or labels[row] in labels[group]:
                continue
            if masks is not None and extents is not None:
                iou = _mask_iou(masks[row], extents[row], masks[best], extents[best])
                if iou < DUPLICATE_IOU:
                    continue
            group.append(row)
            break
        else:
            groups[row] = [row]
    return list(groups.values())


def _mask_iou(
    mask_a: np.ndarray, extent_a: np.ndarray, mask_b: np.ndarray, extent_b: np.ndarray
) -> float:
    """Return the IoU of two masks `(H, W)`, which are looked at in the union of their extents."""
    x0, y0 = np.minimum(extent_a[:2], extent_b[:2])
    x1, y1 = np.maximum(extent_a[2:], extent_b[2:])
    a, b = mask_a[y0:y1, x0:x1], mask_b[y0:y1, x0:x1]
    return float(np.count_nonzero(a & b) / np.maximum(1, np.count_nonzero(a | b)))
