"""Folders of runs, and what their files contain."""

import json


def write_run(folder, factor=1.0):
    folder.mkdir(parents=True)
    records = [
        {"iteration": i, "total_loss": factor / (i + 1), "time": 0.5, "lr": 0.1}
        for i in range(19, 999, 20)
    ]
    records.insert(2, {"iteration": 49, "issues": {"a": {}}})
    records += [
        {"iteration": i, "segm/AP": 3.0 * factor, "segm/AP-star": 1.0, "segm/APl": None}
        for i in (499, 999)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.json").write_text(text + '{"iteration": 9')
    return folder


def content(path):
    """Return the bytes of a file, of `evaluation.json` all but the measured time."""
    data = path.read_bytes()
    if path.name != "evaluation.json":
        return data
    return {key: value for key, value in json.loads(data).items() if key != "seconds_per_image"}
