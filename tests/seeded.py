"""Seeded weights, under detectron2's parameter names, and images for the parity cases.

Every array depends only on its name, its shape and a seed. Two programs that share no code can so
get the same model and the same images without stored files.
"""

import zlib

import numpy as np

# Of the weights of convolutions, by a part of their name; others have 2.
_GAINS = {"cls_score": 1.6, "bbox_pred": 0.15, "mask_pred": 2.5, "fpn_": 1.0}
_GAINS["stem.conv1"] = 2.0 / 60**2  # pixels are centered, not divided by their standard deviation


def _rng(seed: int, name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0xFFFFFFFF)


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return a parameter or buffer, float32, scaled so that activations stay near one."""
    rng = _rng(seed, name)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if leaf == "running_var":
        value = rng.uniform(0.7, 1.3, shape)
    elif leaf == "running_mean":
        value = rng.normal(0.0, 0.1, shape)
    elif len(shape) == 1 and ".norm." in name:  # scale and shift of a (frozen) batch norm
        if leaf == "weight":
            last = "conv3.norm" in name or ("conv2.norm" in name and "block2" in name)
            value = rng.uniform(0.2, 0.4, shape) if last else rng.uniform(0.8, 1.2, shape)
        else:
            value = rng.normal(0.0, 0.1, shape)
    elif leaf == "bias":
        mean = -6.0 if "cls_score" in name else 0.0
        std = 0.3 if "cls_score" in name else 0.7 if "mask_pred" in name else 0.05
        value = rng.normal(mean, std, shape)
    else:
        gain = next((gain for part, gain in _GAINS.items() if part in name), 2.0)
        value = rng.normal(0.0, np.sqrt(gain / int(np.prod(shape[1:]))), shape)
    return value.astype(np.float32)


def state_dict(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return weights for a table of names and shapes (see shapes_*.json)."""
    return {name: weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def image(height: int, width: int, seed: int) -> np.ndarray:
    """Return a uint8 RGB image (H, W, 3): smooth color fields with sharp discs and boxes."""
    rng = _rng(seed, f"image{height}x{width}")
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.empty((height, width, 3))
    for c in range(3):
        field = np.zeros((height, width))
        for _ in range(4):
            fy, fx = rng.uniform(0.5, 6.0, 2)
            py, px = rng.uniform(0, 2 * np.pi, 2)
            field += np.sin(2 * np.pi * fy * ys / height + py) * np.cos(
                2 * np.pi * fx * xs / width + px
            )
        out[..., c] = 110 + 28 * field
    for _ in range(14):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(0.02, 0.3, 2) * min(height, width)
        color = rng.uniform(0, 255, 3)
        if rng.rand() < 0.5:
            inside = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 <= 1
        else:
            inside = (abs(ys - cy) <= ry) & (abs(xs - cx) <= rx)
        out[inside] = 0.35 * out[inside] + 0.65 * color
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
