"""Two processes that train in one folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from tiny_run import tiny_flags

from gdd_fast import pretrain, train
from gdd_fast.errors import CheckpointError
from gdd_fast.training.run_lock import LOCK, only_process

HOLDER = """
import os, sys, time
from pathlib import Path
from gdd_fast.training.run_lock import only_process
with only_process(Path(sys.argv[1])):
    child = os.fork()  # as a process that reads images: it may outlive the one that is killed
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains in tmp_path / "run", and one that it has forked."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def test_the_second_process_is_refused_until_the_first_has_ended(tmp_path, holder):
    run = tmp_path / "run"
    said = r"another process is training in .*run; let it end, or choose another"
    with pytest.raises(CheckpointError, match=said), only_process(run):
        pytest.fail("entered")
    assert (run / LOCK).exists()
    with only_process(run, enabled=False):  # a rank that writes nothing
        pass
    holder.kill()
    holder.wait()
    with only_process(run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_the_commands_say_so_in_one_line_and_touch_nothing(tmp_path, holder, inputs, capsys, command):
    run = tmp_path / "run"
    flags = ["--data", str(inputs / "data.zip"), "--run-dir", str(run), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        train.main(tiny_flags(inputs, run_dir=run)) if command == "train" else pretrain.main(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == (
        f"error: another process is training in {run}; let it end, or choose another --run-dir"
    )
    assert [path.name for path in run.iterdir()] == [LOCK]


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ValueError, match="before the first file"), only_process(tmp_path / "a" / "b"):
        raise ValueError("before the first file")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    lockf = fcntl.lockf

    def others_end(descriptor, operation):
        (tmp_path / LOCK).unlink()
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", others_end)
    with pytest.raises(CheckpointError, match="another process"), only_process(tmp_path):
        pytest.fail("entered")


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_process(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
