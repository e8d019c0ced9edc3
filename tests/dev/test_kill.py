"""`dev/kill_test.py` with two kills: while it writes a checkpoint, and by SIGTERM."""

import sys

import kill_test
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_two_kills(capsys):
    code = kill_test.main(["--kills", "2", "--iterations", "6"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "2 kills in " in printed
    assert "; 0 failures" in printed
