"""The model card of a trained model: a README.md with the metadata that the Hub reads."""

import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCardData

from tensormask.evaluation.report import OVERALL_METRICS
from tensormask.utils.tables import markdown_table

_MAX_NAMES = 20  # of classes
_TASKS = {"bbox": "boxes", "segm": "masks", "boundary": "boundaries of masks"}

_TEXT = """\
# {name}

A [TensorMask](https://arxiv.org/abs/1903.12174) for instance segmentation: it finds a box, a mask,
a class and a score of each object.

- {classes}
- {parameters:.2f} M parameters{train_sets}
- threshold on scores{threshold}

## Use

It needs the Python library `tensormask` with its extra `hub`.

```
tensormask predict image.jpg --weights {source}
```

```python
from tensormask import Predictor

detections = Predictor("{source}", threshold={used_threshold:.3g})("image.jpg")
detections.save("drawing.png")
```

To fine-tune it on other data, give `MODEL.WEIGHTS {source}` to `tensormask train`. The config is in
`config.json`.

## How good it is

{results}
"""


def render_card(
    source: str,
    *,
    class_names: Sequence[str],
    train_sets: Sequence[str],
    test_sets: Sequence[str],
    results: Mapping[str, float],
    threshold: float | None,
    num_parameters: int,
    license: str | None,
) -> str:
    """Return the text of the card.

    Args:
        source: what the commands on the card take, a folder or "hf://user/model".
        results: in percent by names such as "segm/AP", of several test sets "val/segm/AP".
        threshold: with the best F1, as `score_threshold` of a checkpoint.
        license: an identifier of the Hub.
    """
    name = source.rpartition("/")[2]
    rows = _rows(results, test_sets)
    more = ", ..." if len(class_names) > _MAX_NAMES else ""
    number = "1 class" if len(class_names) == 1 else f"{len(class_names)} classes"
    classes = f"{number}: {', '.join(class_names[:_MAX_NAMES])}{more}"
    sets = ", ".join(f"`{train_set}`" for train_set in train_sets)
    text = _TEXT.format(
        name=name,
        source=source,
        classes=classes,
        parameters=num_parameters / 1e6,
        train_sets=f"\n- trained on {sets}" if sets else "",
        threshold=": none is known" if threshold is None else f" with the best F1: {threshold:.3g}",
        used_threshold=0.5 if threshold is None else threshold,
        results=_results(rows),
    )
    return f"---\n{_metadata(name, rows, license).to_yaml()}\n---\n\n{text}"


def _rows(
    results: Mapping[str, float], test_sets: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    """Return the overall metrics by the name of the data set and the task."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in results.items():
        place, _, metric = name.rpartition("/")
        test_set, _, task = place.rpartition("/")
        if task in _TASKS and (metric in OVERALL_METRICS or "@" in metric):
            test_set = test_set or (test_sets[0] if len(test_sets) == 1 else "unnamed")
            rows.setdefault((test_set, task), {})[metric] = value
    return rows


def _results(rows: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    if not rows:
        return "Not measured."
    extra = {metric: None for row in rows.values() for metric in row if "@" in metric}
    columns = [*OVERALL_METRICS, *extra]
    cells = [
        [f"`{test_set}`", _TASKS[task]]
        + [f"{row[column]:.1f}" if column in row else "–" for column in columns]
        for (test_set, task), row in rows.items()
    ]
    lines = markdown_table(["data set", "of", *columns], cells)
    return "\n".join(["COCO's average precision, in percent.", "", *lines])


def _metadata(
    name: str, rows: Mapping[tuple[str, str], Mapping[str, float]], license: str | None
) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name=f"instance segmentation, {_TASKS[task]}",
            dataset_type=re.sub(r"[^\w.-]+", "-", test_set),
            dataset_name=test_set,
            metric_type="mean_average_precision",
            metric_name=f"AP of {_TASKS[task]}",
            metric_value=round(row["AP"], 2),
        )
        for (test_set, task), row in rows.items()
        if "AP" in row
    ]
    return ModelCardData(
        library_name="tensormask",
        pipeline_tag="image-segmentation",
        tags=["instance-segmentation", "model_hub_mixin", "pytorch_model_hub_mixin", "tensormask"],
        license=license,
        model_name=name,
        eval_results=results or None,
    )
