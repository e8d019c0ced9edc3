#!/usr/bin/env python
"""Write MODEL_ZOO.md from the table in tensormask/model_zoo.py: `dev/make_model_zoo.py`."""

from pathlib import Path

from tensormask.model_zoo import MODELS, ZooModel

PATH = Path(__file__).parent.parent / "MODEL_ZOO.md"

TEXT = """\
# Model zoo

`python dev/make_model_zoo.py` makes this file from the table in
[tensormask/model_zoo.py](tensormask/model_zoo.py): change that.

**The files were never seen here**, since there was no network: reading them was tested with seeded
weights in the same formats. The numbers are those of their publishers, and were not measured again.

A name stands wherever weights are given: `MODEL.WEIGHTS` in a YAML file or on a command line,
`tensormask.load_weights(model, name)`, `tensormask.Predictor(cfg, name)`. Its file is downloaded on
first use.

## TensorMask on COCO

| name | config | box AP | mask AP | measured by | weights | SHA-256 begins |
|---|---|---|---|---|---|---|
{models}

To evaluate them (COCO lies in `$TENSORMASK_DATASETS`, else `$DETECTRON2_DATASETS`, else
`./datasets`):

```
{evaluate}
```

In Python:

```python
import tensormask
from tensormask import model_zoo

predictor = tensormask.Predictor(model_zoo.get_config("tensormask_R_50_FPN_6x"))
```

## Backbones to start from

| name | ImageNet top-1 | published by | weights | SHA-256 begins |
|---|---|---|---|---|
{backbones}

The COCO configs start from MSRA's. To start from torchvision's, which see RGB on another scale and
have their stride in the 3x3 convolutions:

```
python tools/train_net.py --config-file configs/tensormask_R_50_FPN_1x.yaml \\
    MODEL.WEIGHTS torchvision_R_50 MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB \\
    MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]" MODEL.PIXEL_STD "[58.395, 57.12, 57.375]"
```

## Other weights

| given | what is read |
|---|---|
| `path/to/model.pth` | that file |
| `https://host/folder/model.pkl`, `http://...` | the file there |
| `detectron2://X` | `https://dl.fbaipublicfiles.com/detectron2/X` |
| `torchvision://ResNet50_Weights.IMAGENET1K_V2` | torchvision's, with 18, 34, 50 or 101 layers |
| `torchvision://resnet50` | their `IMAGENET1K_V1`, as in torchvision's detection models |
| `file:///folder/model.pth` | `/folder/model.pth` |

Downloads are kept in `$TENSORMASK_CACHE`, else in the user's cache folder (on Linux
`$XDG_CACHE_HOME/tensormask`, else `~/.cache/tensormask`), in a folder for each address. A file
appears there once it came whole and, where digits of its SHA-256 are known, has them.
"""


def render() -> str:
    """The text of MODEL_ZOO.md."""
    models = [model for model in MODELS.values() if model.config is not None]
    backbones = [model for model in MODELS.values() if model.config is None]
    return TEXT.format(
        models="\n".join(_row(model, ("box AP", "mask AP")) for model in models),
        evaluate="\n".join(_evaluation(model) for model in models if model.url is not None),
        backbones="\n".join(_row(model, ("top-1",)) for model in backbones),
    )


def _row(model: ZooModel, metrics: tuple[str, ...]) -> str:
    config = [] if model.config is None else [f"[{Path(model.config).name}]({model.config})"]
    numbers = [f"{model.metrics[m]:.1f}" if m in model.metrics else "–" for m in metrics]
    weights = "none released" if model.url is None else f"[{Path(model.url).name}]({model.url})"
    sha256 = "–" if model.url is None else "not known" if model.sha256 is None else model.sha256
    cells = [f"`{model.name}`", *config, *numbers, model.source, weights, sha256]
    return f"| {' | '.join(cells)} |"


def _evaluation(model: ZooModel) -> str:
    return (
        f"python tools/train_net.py --config-file {model.config} --eval-only "
        f"MODEL.WEIGHTS {model.name}"
    )


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
