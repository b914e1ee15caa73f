"""Outputs that cannot be written: one line that names the path, before any work, and nothing left behind."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_flags, tiny_network, write_inputs

from gdd_fast import convert, evaluate, prepare, pretrain, sample, train
from gdd_fast.cli import command
from gdd_fast.errors import CheckpointError
from gdd_fast.files import check_destination, check_writable, write_tensors
from gdd_fast.models.files.save import save_network

ROOT = Path(__file__).resolve().parents[2]
# Takes no files, from root neither, whatever its permissions say.
NOWHERE = Path("/proc/gdd_fast")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@contextlib.contextmanager
def small_files(size):
    """The system lets no file grow beyond `size` bytes, much as a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(main, capsys, *flags):
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    assert end.value.code == 2
    text = capsys.readouterr().err
    last = text.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in text
    return last


@pytest.fixture
def no_work(monkeypatch):
    """The first thing that takes time in each command."""

    def work(*_, **__):
        pytest.fail("work was begun")

    for module, name in (
        (sample, "load_generator"),
        (convert, "_read"),
        (prepare, "open_source"),
        (evaluate, "Measurement"),
        (pretrain, "join"),
    ):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr("gdd_fast.distill.components.load_data", work)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (sample.main, ["--net", "demo", "--out", NOWHERE]),
        (sample.main, ["--net", "demo", "--out", NOWHERE / "x.zip"]),
        (sample.main, ["--net", "demo", "--grid", NOWHERE / "g.png"]),
        (convert.main, ["any", NOWHERE]),
        (convert.main, ["any", NOWHERE / "x.pt"]),
        (prepare.main, ["--source", "any", "--dest", NOWHERE / "p.zip"]),
        (evaluate.main, ["ref", "--data", "demo", "--features", "pixels", "--out", NOWHERE / "r.npz"]),
        (pretrain.main, ["--run-dir", NOWHERE]),
        (train.main, ["--run-dir", NOWHERE]),
        (train.main, ["--run-dir", NOWHERE, "--dry-run"]),
    ],
    ids=lambda value: value.__module__ if callable(value) else " ".join(map(str, value[-2:])),
)
def test_a_place_that_takes_no_files(main, flags, capsys, no_work):
    assert "cannot be written to: /proc" in refused(main, capsys, *flags)


def test_what_checks_leave_behind(tmp_path):
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "a" / "b")
    check_destination(tmp_path / "file")
    check_destination(tmp_path / "a" / "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_reference_does_not_replace_a_file(tmp_path, capsys, no_work):
    data_set = tmp_path / "images.npz"
    data_set.write_bytes(b"a data set")
    flags = ["ref", "--data", "demo", "--features", "pixels", "--out", data_set]
    assert "images.npz exists" in refused(evaluate.main, capsys, *flags)
    assert data_set.read_bytes() == b"a data set"


@pytest.mark.parametrize("destination", ["folder", "x.safetensors", "x.pt"])
def test_convert_to_a_full_disk(tmp_path, capsys, destination):
    save_network(tiny_network(), tmp_path / "net")
    with small_files(8192):
        line = refused(convert.main, capsys, tmp_path / "net", tmp_path / destination)
    assert os.strerror(errno.EFBIG) in line and "make room" in line
    assert not [path for path in (tmp_path / destination, *tmp_path.glob("**/.*")) if path.is_file()]


def test_a_run_on_a_full_disk(inputs, tmp_path, capsys):
    with small_files(65536):
        line = refused(train.main, capsys, *tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=4e-6))
    assert "checkpoint.safetensors cannot be written (File too large)" in line


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.zeros(3)})
    before = path.read_bytes()
    with small_files(4096), pytest.raises(OSError) as raised:
        write_tensors(path, {"x": torch.zeros(4096)})
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "error: x/y: Permission denied; choose another"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; make room"),
        (MemoryError("12 GiB"), "error: not enough memory (12 GiB)"),
    ],
)
def test_errors_of_the_system_are_one_line(error, line, capsys):
    @command
    def main(_):
        raise error

    assert refused(main, capsys, "").startswith(line)


def test_an_error_that_is_about_no_path_is_not_hidden():
    @command
    def main():
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file"):
        main()


def test_a_pipe_that_breaks_elsewhere_is_not_hidden():
    @command
    def main():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        main()


def test_a_reader_that_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-m", "gdd_fast.train", "--help"], stdout=writer, stderr=subprocess.PIPE, env=environment
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(("ends", "status"), [(0, 141), (130, 130), (75, 75)])
def test_a_reader_that_goes_does_not_end_the_work_nor_decide_its_status(tmp_path, ends, status):
    """As the `tee` of `train 2>&1 | tee log`, which dies of the same Ctrl-C."""
    script = f"""
import pathlib
from gdd_fast.cli import command

@command
def main():
    for number in range(2):
        print("a line")
        pathlib.Path("done").write_text(str(number))
    raise SystemExit({ends})

main()
"""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": writer, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, **streams)
    os.close(writer)
    assert (process.returncode, process.stderr, (tmp_path / "done").read_text()) == (status, b"", "1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_stdout_is_said_when_the_work_is_done(monkeypatch, capsys):
    @command
    def main(_):
        print("a line")
        done.append(True)

    done = []
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        line = refused(main, capsys, "")
    assert done and line.startswith("error: standard output: No space left on device; make room")


class TestUnderTorchrun:
    """The environment as torchrun sets it; torchrun itself shows what the file says of the process that fails first."""

    @pytest.fixture
    def fail(self, monkeypatch, tmp_path, capsys):
        def fail(rank):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

            @command
            def main():
                raise CheckpointError("no such thing")

            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 2
            return capsys.readouterr().err

        return fail

    def test_the_first_process_says_it(self, fail):
        assert fail(0) == "error: no such thing\n"
        assert fail(1) == ""

    @pytest.mark.parametrize("rank", [0, 1])
    def test_torchrun_is_told(self, fail, rank, tmp_path):
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        fail(rank)
        failure = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
        assert failure.message == "error: no such thing" and failure.timestamp > 0
