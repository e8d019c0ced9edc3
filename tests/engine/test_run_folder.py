"""A folder is one run's, dead ones leave nothing, and what ran is on record."""

import os
import signal
import subprocess
import sys

import pytest

from tensormask.engine import run_folder
from tensormask.engine.run_folder import git_state, lock_folder, record_environment

HOLD = """
import sys, time
from tensormask.engine.run_folder import lock_folder
with lock_folder(sys.argv[1]):
    if len(sys.argv) > 2:
        import os
        if os.fork() == 0:  # a worker, which outlives its parent
            time.sleep(60)
            os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def hold(folder, *words):
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "locked\n"
    return process


def end_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def test_two_runs_refuse_each_other_and_the_dead_hold_nothing(tmp_path):
    process = hold(tmp_path, "with a worker")
    try:
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on .*OUTPUT_DIR"):
            with lock_folder(tmp_path):
                pytest.fail("two at once")
        process.kill()
        process.wait()
        with lock_folder(tmp_path):  # though the worker still runs
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        end_group(process)


def test_the_folder_is_made_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path / "a" / "b"):
            pass


def test_leftovers_of_a_killed_run_go(tmp_path):
    (tmp_path / ".model_0000009.pth.1.tmp").touch()
    (tmp_path / "model_0000004.pth").touch()
    with lock_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "model_0000004.pth"]


def test_a_system_without_locks_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_folder, "fcntl", None)
    with lock_folder(tmp_path):
        assert "no file locks" in caplog.text


def test_environment_of_each_start(tmp_path):
    record_environment(tmp_path)
    record_environment(tmp_path)
    text = (tmp_path / "environment.txt").read_text()
    assert text.count("==== 2") == 2
    assert "torch " in text
    assert sys.executable in text


def test_git_state(tmp_path):
    assert git_state(tmp_path) == "no repository, or no git"

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert git_state(tmp_path).endswith(", nothing changed")
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "b.py").write_text("2")
    commit, _, changed = git_state(tmp_path).partition(", changed: ")
    assert len(commit) == 40
    assert changed == "a.py, b.py"
