"""tools/kill_test.py in short: killed while it writes, told to stop, and equal at the end."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "kill_test", Path(__file__).parent.parent / "tools" / "kill_test.py"
)
kill_test = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kill_test)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_two_kills(capsys):
    code = kill_test.main(["--kills", "2", "--iterations", "6"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "2 kills in " in said
    assert "; 0 failures" in said
