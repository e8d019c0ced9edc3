"""dev/kill_test.py in short: killed while it writes, told to stop, and equal at the end."""

import sys

import kill_test
import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_two_kills(capsys):
    code = kill_test.main(["--kills", "2", "--iterations", "6"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "2 kills in " in said
    assert "; 0 failures" in said
