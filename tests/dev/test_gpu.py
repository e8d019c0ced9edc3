"""The steps of `make gpu-check` run, here on the CPU: equal devices give equal numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    environment = os.environ | {"DEVICE": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'dev'}"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_kernels(tmp_path):
    run("-m", "gpu.kernels", "compiled", str(tmp_path / "kernels.json"))
    results = json.loads((tmp_path / "kernels.json").read_text())["compiled"]
    assert len(results) == 4
    row = results["50 random windows"]
    assert row["forward error/eps"] == row["backward error/eps"] == 0
    assert "error" not in results["1 image of 20 objects"]


@pytest.mark.parametrize("case", ["bipyramid", "no boxes"])
def test_devices(case):
    code = (
        "import json, torch; from gpu import devices; "
        f"print(json.dumps(devices.compare(devices.CASES[{case!r}], torch.float64)))"
    )
    result = json.loads(run("-c", code).splitlines()[-1])
    assert result["loss error"] < 1e-9
    assert result["gradient error"] < 1e-9
    assert max(result["masks that differ"]) == 0


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    code = (
        f"from gpu import Results; results = Results({str(tmp_path / 'a.json')!r}, 'part'); "
        "results.step('bad', 5, lambda: 1 / 0); results.step('good', 5, lambda: 3)"
    )
    run("-c", code)
    results = json.loads((tmp_path / "a.json").read_text())["part"]
    assert results["bad"]["error"].startswith("ZeroDivisionError")
    assert results["good"] == 3
