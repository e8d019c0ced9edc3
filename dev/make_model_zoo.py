#!/usr/bin/env python
"""Write MODEL_ZOO.md from the table in tensormask/checkpoint/zoo.py: `dev/make_model_zoo.py`."""

from pathlib import Path

from tensormask.model_zoo import MODELS, PACKAGED, ZooModel

PATH = Path(__file__).parent.parent / "MODEL_ZOO.md"
PACKAGED_METRICS = ("mask AP", "box AP")

TEXT = """\
# Model zoo

`python dev/make_model_zoo.py` writes this file from the table in
[tensormask/checkpoint/zoo.py](tensormask/checkpoint/zoo.py). Change the table, not this file.

Use a name wherever weights are expected: `MODEL.WEIGHTS` in a YAML file or on a command line,
`tensormask.load_weights(model, name)`, `tensormask.Predictor(cfg, name)`. If the file does not come
with the package, it is downloaded on first use.

## In the package

| name | finds | mask AP | box AP | measured on | SHA-256 |
|---|---|---|---|---|---|
{packaged}

`tensormask predict image.png` uses it; `Predictor("{name}")` needs no config. The
[model card](tensormask/weights/README.md) says how it was made and on which images it fails. It was
trained on public-domain data (CC0).{command}

## TensorMask on COCO

**These files, and the backbones below, were not downloaded here**, because there was no network.
Reading them was tested with seeded weights in the same formats. The metrics are those of the
publishers and were not measured again.

| name | config | box AP | mask AP | measured by | weights | SHA-256 begins |
|---|---|---|---|---|---|---|
{models}

To evaluate them, with COCO in `$TENSORMASK_DATASETS`, else `$DETECTRON2_DATASETS`, else
`./datasets`:

```
{evaluate}
```

In Python:

```python
import tensormask
from tensormask import model_zoo

predictor = tensormask.Predictor(model_zoo.get_config("tensormask_R_50_FPN_6x"))
```

## Backbones

| name | ImageNet top-1 | published by | weights | SHA-256 begins |
|---|---|---|---|---|
{backbones}

The COCO configs start from MSRA's weights. torchvision's expect RGB on another scale and have the
stride in the 3x3 convolutions. To start from them:

```
tensormask train --config-file tensormask_R_50_FPN_1x \\
    MODEL.WEIGHTS torchvision_R_50 MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB \\
    MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]" MODEL.PIXEL_STD "[58.395, 57.12, 57.375]"
```

## Other weights

| value of `MODEL.WEIGHTS` | file |
|---|---|
| `path/to/model.pth` | the local file |
| `https://host/folder/model.pkl`, `http://...` | the file at this URL |
| `detectron2://X` | `https://dl.fbaipublicfiles.com/detectron2/X` |
| `torchvision://ResNet50_Weights.IMAGENET1K_V2` | torchvision's ResNet: 18, 34, 50 or 101 layers |
| `torchvision://resnet50` | its `IMAGENET1K_V1`, as in torchvision's detection models |
| `file:///folder/model.pth` | `/folder/model.pth` |

Downloads are stored in `$TENSORMASK_CACHE`, else in the user's cache folder (on Linux
`$XDG_CACHE_HOME/tensormask`, else `~/.cache/tensormask`), with one folder per URL. A file appears
there after its download is complete and its SHA-256 begins with the known digits, if any.
"""


def render() -> str:
    """The text of MODEL_ZOO.md."""
    models = [model for model in MODELS.values() if model.config is not None]
    backbones = [model for model in MODELS.values() if model.is_backbone]
    packaged = MODELS[PACKAGED]
    return TEXT.format(
        name=PACKAGED,
        packaged=_packaged_row(packaged),
        command=f"\nThe training was `{packaged.command}`." if packaged.command else "",
        models="\n".join(_row(model, ("box AP", "mask AP")) for model in models),
        evaluate="\n".join(_evaluation(model) for model in models if model.url is not None),
        backbones="\n".join(_row(model, ("top-1",)) for model in backbones),
    )


def _row(model: ZooModel, metrics: tuple[str, ...]) -> str:
    config = [] if model.config is None else [f"[{Path(model.config).name}]({model.config})"]
    numbers = [f"{model.metrics[m]:.1f}" if m in model.metrics else "–" for m in metrics]
    weights = "none released" if model.url is None else f"[{Path(model.url).name}]({model.url})"
    sha256 = "–" if model.url is None else "unknown" if model.sha256 is None else model.sha256
    cells = [f"`{model.name}`", *config, *numbers, model.source, weights, sha256]
    return f"| {' | '.join(cells)} |"


def _packaged_row(model: ZooModel) -> str:
    numbers = [f"{model.metrics[m]:.1f}" if m in model.metrics else "–" for m in PACKAGED_METRICS]
    sha256 = model.sha256 or "unknown"
    return f"| {' | '.join([f'`{model.name}`', 'cell nuclei', *numbers, model.source, sha256])} |"


def _evaluation(model: ZooModel) -> str:
    return f"tensormask evaluate --config-file {model.name} MODEL.WEIGHTS {model.name}"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
