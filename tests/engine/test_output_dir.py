"""OUTPUT_DIR: one run at a time, no leftovers of killed runs, and a record of each start."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fork import CONTEXT, run_in_ranks

from tensormask.engine import distributed, output_dir
from tensormask.engine.output_dir import (
    git_state,
    link_latest,
    lock_output_dir,
    open_output_dir,
    record_environment,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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


def open_new(folder, barrier, opened):
    """Open the folder of a new run at the same moment as others, and keep it for their time."""
    barrier.wait()
    with open_output_dir(folder, new_run=True) as taken:
        opened.put(taken.name)
        barrier.wait()


def test_runs_that_start_at_the_same_moment_take_different_folders(tmp_path):
    barrier, opened = CONTEXT.Barrier(4), CONTEXT.Queue()
    arguments = (tmp_path / "run", barrier, opened)
    processes = [CONTEXT.Process(target=open_new, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    names = {opened.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert names == {"run", "run_2", "run_3", "run_4"}


def test_a_folder_in_which_no_run_has_started_is_used(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    with open_output_dir(tmp_path, new_run=True) as folder:
        assert folder == tmp_path
    (tmp_path / "metrics.json").touch()
    with open_output_dir(tmp_path) as folder:  # as it is given: resumed, evaluated or overwritten
        assert folder == tmp_path
    monkeypatch.chdir(tmp_path)
    with open_output_dir(".", new_run=True) as folder:
        assert folder == tmp_path.with_name(f"{tmp_path.name}_2")


def test_a_run_that_takes_a_folder_before_it_is_locked(tmp_path, monkeypatch):
    """It starts and ends between the look into the folder and the lock."""

    @contextmanager
    def late(folder):
        if folder == tmp_path:
            (folder / "metrics.json").touch()
        with lock_output_dir(folder):
            yield

    monkeypatch.setattr(output_dir, "lock_output_dir", late)
    with open_output_dir(tmp_path, new_run=True) as folder:
        assert folder.name == f"{tmp_path.name}_2"


def test_all_ranks_use_the_folder_of_rank_0(tmp_path):
    (tmp_path / "metrics.json").touch()

    def run():
        distributed.start("cpu")
        with open_output_dir(tmp_path, new_run=True) as folder:
            exists = folder.is_dir()
            distributed.barrier()
        distributed.stop()
        return int(not exists or folder.name != f"{tmp_path.name}_2")

    assert run_in_ranks(run) == [0, 0]


def test_the_latest_run_of_a_folder_that_is_a_link(tmp_path):
    """The numbered folders are beside the link, not beside the folder that it points to."""
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "run").symlink_to("elsewhere/folder")
    link_latest(tmp_path / "run", tmp_path / "run_2")
    assert (tmp_path / "run_latest").readlink() == Path("run_2")
    assert os.listdir(tmp_path / "elsewhere") == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "no links"])
def test_where_no_link_is_possible(tmp_path, monkeypatch, kind):
    link = tmp_path / "run_latest"
    if kind == "file":
        link.write_text("mine")
    elif kind == "folder":
        link.mkdir()
    else:
        monkeypatch.setattr(Path, "symlink_to", lambda *args, **options: os.readlink("/nowhere"))
    link_latest(tmp_path / "run", tmp_path / "run")
    assert not link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"run_latest"}


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
