"""Configs by path and by name."""

from pathlib import Path

import pytest
from tiny import CONFIGS

from tensormask.config import config_names, find_config, get_cfg

QUICKSTART = CONFIGS / "quickstart.yaml"


def test_every_config_has_a_name():
    names = config_names()
    assert {"quickstart", "tensormask_R_50_FPN_1x", "ablations/bipyramid"} <= {*names}
    assert [find_config(name) for name in names] == [CONFIGS / f"{name}.yaml" for name in names]
    assert len(names) == len([*CONFIGS.rglob("*.yaml")])


@pytest.mark.parametrize(
    "name",
    ["quickstart", "configs/quickstart.yaml", "./configs/quickstart.yaml", Path("quickstart")],
)
def test_a_name_and_a_path_of_the_repository_need_no_clone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # such as a run's folder
    assert find_config(name) == QUICKSTART
    by_name, by_path = get_cfg(), get_cfg()
    by_name.merge_from_file(name)
    by_path.merge_from_file(QUICKSTART)
    assert by_name == by_path


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for path in (Path("quickstart"), Path("configs/quickstart.yaml")):
        path.write_text("SEED: 77")
        cfg = get_cfg()
        cfg.merge_from_file(path)
        assert cfg.SEED == 77


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("tensormask_R50_FPN_1x", "'tensormask_R_50_FPN_1x'"),
        ("elsewhere/quickstart.yaml", "'quickstart'"),
        ("", ""),
        ("\0" * 1000, ""),
    ],
)
def test_an_unknown_name(name, nearest):
    message = rf"is not a file or the name of a config; the nearest name is .*{nearest}"
    with pytest.raises(ValueError, match=message) as error:
        find_config(name)
    assert len(str(error.value)) < 1500
