"""OUTPUT_DIR: one run at a time, no leftovers of killed runs, and a record of each start."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fork import CONTEXT

from tensormask.engine.output_dir import git_state, lock_output_dir, record_environment


def hold(folder, locked):
    """Lock a folder until the process is killed; its own worker, a fork, outlives it."""
    os.setsid()
    with lock_output_dir(folder):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        locked.set()
        time.sleep(60)


def test_a_folder_is_locked_until_its_run_ends(tmp_path):
    locked = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path, locked))
    process.start()
    try:
        assert locked.wait(30)
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on .*OUTPUT_DIR"):
            with lock_output_dir(tmp_path):
                pytest.fail("two runs")
        process.kill()
        process.join()
        with lock_output_dir(tmp_path):  # though the worker is still running
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".model_0000009.pth.1.tmp").touch()
    (tmp_path / "model_0000004.pth").touch()
    with lock_output_dir(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "model_0000004.pth"]


def test_a_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock_output_dir(tmp_path / "new" / "folder"):
        assert "No file locks" in caplog.text


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
    assert git_state(tmp_path).endswith(", no changes")
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "b.py").write_text("2")
    commit, _, changed = git_state(tmp_path).partition(", changed: ")
    assert len(commit) == 40
    assert changed == "a.py, b.py"
