"""Made-up images, targets and scores, to measure a model without data and trained weights."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tensormask.modeling import TensorMask
from tensormask.modeling.head import DenseOutputs
from tensormask.modeling.inputs import padded_size

# COCO's small, medium and large objects: their share, and the range of their longer side in
# pixels, in an image whose shorter side is 480 px.
_COCO_OBJECTS = ((0.40, 8, 32), (0.35, 32, 96), (0.25, 96, 640))
_SHORTER_SIDE = 480
_OBJECT_SIDES = (20, 700)  # pixels, of training targets
_NEVER = -20.0  # a logit


def make_image(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a seeded uint8 image (3, height, width): noise of all scales, mostly coarse."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, *size)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        total += F.interpolate(noise, size, mode="bilinear") / cells**0.5
    return (128 + 50 * total[0]).clamp(0, 255).byte()


def make_target(
    size: tuple[int, int], num_objects: int, num_classes: int = 80, seed: int = 0
) -> dict[str, Tensor]:
    """Return a seeded target: ellipses of any class, the longer axis log-uniform, 20 to 700 px.

    The shorter axis is at least half as long. Objects larger than the image are reduced to it.
    """
    generator = torch.Generator().manual_seed(seed)
    longer, aspect, upright, x, y = torch.rand(5, num_objects, generator=generator)
    smallest, largest = _OBJECT_SIDES
    longer = smallest * (largest / smallest) ** longer
    shorter = longer * (1 + aspect) / 2
    height = torch.where(upright < 0.5, longer, shorter).clamp(max=size[0])
    width = torch.where(upright < 0.5, shorter, longer).clamp(max=size[1])
    x0, y0 = x * (size[1] - width), y * (size[0] - height)
    boxes = torch.stack([x0, y0, x0 + width, y0 + height], dim=1)
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    across = (columns - (x0 + width / 2)[:, None]) / (width / 2)[:, None]
    down = (rows - (y0 + height / 2)[:, None]) / (height / 2)[:, None]
    masks = across[:, None, :] ** 2 + down[:, :, None] ** 2 <= 1
    labels = torch.randint(num_classes, (num_objects,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks}


def keep_signal(backbone: nn.Module) -> None:
    """Draw weights of a ResNet whose activations neither grow nor vanish, also in float16."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, Bottleneck) and hasattr(module.bn3, "weight"):
            nn.init.constant_(module.bn3.weight, 0.3)


def objects_per_level(largest: Sequence[float], size: tuple[int, int], count: int) -> list[int]:
    """Return how many of `count` objects each level takes if they have the sizes of COCO's.

    Args:
        largest: the longest side in pixels of a level's objects, fine to coarse; the coarsest
            level takes all larger ones.
        size: height and width of the image in pixels.
    """
    scale = min(size) / _SHORTER_SIDE
    counts = [0] * len(largest)
    for i in range(count):
        side = scale * _side_of_object((i + 0.5) / count)
        fitting = [level for level, limit in enumerate(largest[:-1]) if side <= limit]
        counts[fitting[0] if fitting else -1] += 1
    return counts


def _side_of_object(quantile: float) -> float:
    """Return the longer side in pixels of the object at a quantile of the sizes, 0 to 1."""
    longest = 0.0
    for share, shortest, longest in _COCO_OBJECTS:
        if quantile < share:
            return shortest * (longest / shortest) ** (quantile / share)
        quantile -= share
    return longest


def scatter_logits(
    shapes: Sequence[Sequence[int]], counts: Sequence[int], strong: Tensor, weak: Tensor
) -> list[Tensor]:
    """Put logits at seeded random locations of levels; all other locations never pass.

    Args:
        shapes: shape of each level's result.
        counts: weights of the levels in the distribution of the strong logits.
        strong: logits (K,) that follow `counts`.
        weak: logits (L,) that may be anywhere.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([math.prod(shape) for shape in shapes])
    logits = torch.full((int(sizes.sum()),), _NEVER)
    logits[torch.randint(len(logits), (len(weak),), generator=generator)] = weak
    level = torch.tensor(counts, dtype=torch.float).multinomial(
        len(strong), replacement=True, generator=generator
    )
    within = (torch.rand(len(strong), generator=generator) * sizes[level]).long()
    logits[(sizes.cumsum(0) - sizes)[level] + within] = strong
    return [x.view(*shape) for x, shape in zip(logits.split(sizes.tolist()), shapes, strict=True)]


def make_up_scores(model: TensorMask) -> None:
    """Replace the scores of a model, so that it detects as much as it can in any image.

    The detections are on levels as for objects of COCO's sizes. As many windows as the model
    takes are candidates for NMS. What the heads compute is computed as before, without what a query
    would leave out.
    """
    dense = model.dense
    made: dict[tuple[int, int], list[Tensor]] = {}  # per level, by image size

    def dense_with_scores(images: list[Tensor]) -> DenseOutputs:
        outputs = dense(images)
        size = (max(x.shape[1] for x in images), max(x.shape[2] for x in images))
        if size not in made:
            made[size] = [x.to(outputs.logits[0]) for x in make_up_logits(model, size)]
        logits = [x.expand(len(images), *x.shape) for x in made[size]]
        return outputs._replace(logits=logits)

    vars(model)["dense"] = dense_with_scores
    vars(model)["_detection_outputs"] = lambda images: (dense_with_scores(images), None)


def make_up_logits(
    model: TensorMask, size: tuple[int, int], *, finest_only: bool = False
) -> list[Tensor]:
    """Return the logits of `make_up_scores` for images of a size, per level (C, H, W).

    With ``finest_only``, all detections are on the finest level.
    """
    # Half of the strong ones may be suppressed by others.
    num_strong = 2 * model.num_detections
    highest = -0.1
    lowest = math.log(model.score_threshold / (1 - model.score_threshold)) + 0.1
    strong = torch.linspace(4.0, 0.0, num_strong)
    num_weak = max(0, model.num_candidates - num_strong)
    weak = torch.linspace(min(lowest, highest), highest, num_weak)
    largest = [max(sides) for sides in model.windows.sizes]
    counts = objects_per_level(largest, size, model.num_detections)
    if finest_only:
        counts = [model.num_detections] + [0] * (len(counts) - 1)
    channels = model.windows.num_sizes * model.num_classes
    height, width = padded_size(*size, model.size_divisor)
    shapes = [(channels, -(-height // s), -(-width // s)) for s in model.windows.strides]
    return scatter_logits(shapes, counts, strong, weak)
