"""The table of a query's thresholds, and the one that is stored in a checkpoint."""

import pytest
import tiny
import torch

from tensormask.checkpoint.files import read_checkpoint
from tensormask.commands import analyze
from tensormask.data import shapes
from tensormask.evaluation.query import QueryScores
from tensormask.utils.errors import UserError

_HEAD = "MODEL.TENSOR_MASK."


def test_thresholds_by_hand() -> None:
    """Of 4 positive windows, the threshold for a recall of 0.75 leaves out the lowest."""
    scores = QueryScores(
        torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8])
    )
    threshold = scores.threshold(0.75)
    assert 0.399 < threshold < 0.4
    assert (scores.recall(threshold), scores.share(threshold)) == (0.75, pytest.approx(0.4))
    assert scores.threshold(1.0) == pytest.approx(0.1)
    assert scores.recall(scores.threshold(1.0)) == 1
    assert (scores.recall(0.0), scores.share(0.0)) == (1, 1)
    with pytest.raises(UserError, match="nothing to find"):
        QueryScores(torch.zeros(0), torch.zeros(4)).threshold(0.9)


def test_the_command_stores_the_threshold(tmp_path, capsys) -> None:
    shapes.write_split("val", 3, tmp_path)
    data = f"{tmp_path}/annotations.json@{tmp_path}/images"
    opts = [_HEAD + "QUERY_ON", True, _HEAD + "NUM_CLASSES", 6, "DATASETS.TEST", (data,)]
    opts += ["INPUT.MIN_SIZE_TEST", 128, "DATALOADER.NUM_WORKERS", 0]
    model, cfg = tiny.build(opts=opts), tiny.get_cfg(opts=opts)
    torch.nn.init.normal_(model.head.query.convs[0].weight, std=0.3)
    checkpoint = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, checkpoint)
    assert analyze.main(["--query", str(checkpoint), "--recalls", "0.9", "--store", "0.5"]) == 0
    header, whole, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert header[:3] == ["threshold", "recall", "share"]
    assert whole[:3] == ["0", "1", "1"]
    shares = [float(row[2]) for row in rows]
    assert 1 > shares[0] > shares[1] > 0
    stored = read_checkpoint(checkpoint)["model"]["head.query.threshold"]
    assert float(stored) == pytest.approx(float(rows[1][0]), rel=1e-3)
    assert analyze.main(["--query", str(checkpoint), _HEAD + "QUERY_ON", "False"]) == 2
