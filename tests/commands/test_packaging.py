"""What setup.py and requirements.txt promise."""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_setup_reads_the_version_without_importing(tmp_path):
    """In a Python that has neither torch nor this package on its path, beside setuptools."""
    command = [sys.executable, "setup.py", "--version"]
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('setup.py imported torch')\n")
    env = {"PATH": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    version = (ROOT / "tensormask" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{done.stdout.split()[-1]}"' in version


def test_pins_lie_inside_the_bounds_of_setup():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    listed = text[text.index("install_requires=[") :].splitlines()
    bounds = [Requirement(x.strip().strip('",')) for x in listed if x.strip().startswith('"')]
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert len(bounds) >= 10
    for bound in bounds:
        assert "<" in str(bound.specifier), bound
        assert bound.specifier.contains(pins[bound.name]), bound
    assert pins["torch"] == "2.14.1"
