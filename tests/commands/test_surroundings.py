"""Commands in surroundings that lack something: file descriptors, a home, a terminal, a clock, a folder."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_flags

from gdd_fast import convert, evaluate, prepare, pretrain, sample, train
from gdd_fast.training import loggers

ROOT = Path(__file__).resolve().parents[2]


def flags_of(command, inputs: Path, out: Path) -> list[str]:
    small = {"duration_mimg": 8e-6, "data_memory_gib": 0}
    words = {
        sample: f"--net {inputs}/teacher --seeds 0-7 --sigma-max 80 --device cpu --out {out}/images.zip",
        prepare: f"--source {inputs}/data.zip --dest {out}/small.zip --resolution 8",
        convert: f"{inputs}/teacher {out}/network",
        evaluate: f"ref --data {inputs}/data.zip --features pixels --device cpu --out {out}/real.npz",
        pretrain: f"--run-dir {out}/run --data {inputs}/data.zip --model-channels 8 --num-blocks 1 --batch 4 "
        "--device cpu --duration-mimg 8e-6 --data-memory-gib 0",
    }
    return tiny_flags(inputs, run_dir=out / "run", **small) if command is train else words[command].split()


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def no_home() -> None:
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


def clock_runs_backwards() -> None:
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= 1e6
        return now

    time.time = earlier


def in_a_fork(folder: Path, work: Callable[[], None]) -> tuple[int, str]:
    """What the process ends with, and all that it says to anybody."""
    said = folder / "said"
    child = os.fork()
    if not child:
        code = 1
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            loggers.find_spec = lambda name: None
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


@pytest.mark.parametrize(
    "command",
    [prepare, sample, convert, evaluate, *(pytest.param(main, marks=pytest.mark.slow) for main in (pretrain, train))],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
@pytest.mark.parametrize("lacking", [few_files, no_home, clock_runs_backwards], ids=lambda f: f.__name__)
def test_commands_that_lack_something_all_the_same(inputs, tmp_path, command, lacking):
    def work() -> None:
        lacking()
        command.main(flags_of(command, inputs, tmp_path))

    code, said = in_a_fork(tmp_path, work)
    assert code == 0, said
    assert {path.name for path in tmp_path.iterdir()} > {"said"}


def little_memory(mib: float) -> None:
    """No more than `mib` on top of what the process has; torch and its libraries are there already."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(mib * 2**20),) * 2)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@needs_proc
def test_no_memory_for_a_thread(inputs, tmp_path):
    def work() -> None:
        threading.stack_size(256 << 20)
        little_memory(128)
        prepare.main(flags_of(prepare, inputs, tmp_path))

    code, said = in_a_fork(tmp_path, work)
    assert code == 2 and said.splitlines()[-1].startswith("error: the system cannot start more threads: ")
    assert "Traceback" not in said and os.listdir(tmp_path) == ["said"]


ABORTED = (-signal.SIGABRT, -signal.SIGSEGV, 127)
"""C libraries that end the process themselves if they get no memory: safetensors', oneDNN's and glibc's way."""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("command", [prepare, sample, convert, evaluate, pretrain, train], ids=lambda m: m.__name__)
def test_too_little_memory(inputs, tmp_path, command):
    """One line, whenever it is not enough; and the same command goes on as soon as there is more."""
    ends = []
    for mib in (0, 4, 16, 32, 64, 96, 128, 192, 256, 320, 512, 4096):
        out = tmp_path / str(mib)
        out.mkdir()

        def work(mib=mib, out=out) -> None:
            if mib is not None:
                little_memory(mib)
            command.main(flags_of(command, inputs, out))

        code, said = in_a_fork(out, work)
        ends.append(code)
        assert "Traceback" not in said and code in (0, 2, *ABORTED), (mib, code, said)
        if code == 2:
            errors = ("error: not enough memory", "error: the system cannot start more threads")
            assert any(line.startswith(errors) for line in said.splitlines()), (mib, said)
        if code:
            code, said = in_a_fork(out, lambda: work(None))
            assert code == 0, (mib, said)
    assert 2 in ends and 0 in ends


def test_a_working_directory_that_is_gone(inputs, tmp_path):
    """PyTorch would end in a traceback in the middle of the work."""

    def work() -> None:
        (tmp_path / "here").mkdir()
        os.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        sample.main(flags_of(sample, inputs, tmp_path))

    code, said = in_a_fork(tmp_path, work)
    assert (code, said) == (2, "error: the working directory no longer exists: cd to one that does\n")


@pytest.mark.slow
def test_a_c_locale_and_nobody_at_a_terminal(inputs, tmp_path):
    """With a name that ASCII does not have; Python is told not to help."""
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    out = tmp_path / "Bilder-\u00fc"
    told = subprocess.run(
        [sys.executable, "-m", "gdd_fast.prepare", "--source", inputs / "data.zip", "--dest", out / "small.zip"],
        env={**bare, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True, timeout=600,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert (out / "small.zip").exists()


@pytest.mark.parametrize(
    ("torch_does", "ends"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", (130, "interrupted\n")),
        ("raise MemoryError", (2, "error: not enough memory")),
        ("raise ImportError('lib.so: failed to map segment from shared object')", (2, "error: not enough memory")),
    ],
    ids=["ctrl-c", "memory", "memory for a library"],
)
@pytest.mark.parametrize(
    "command",
    [
        *("train --run-dir {0}", "analyze --teacher demo", "report {0}", "sample", "evaluate", "pretrain", "prepare"),
        *("convert", "export"),
    ],
    ids=lambda words: words.split()[0],
)
def test_a_command_that_is_stopped_while_it_imports_torch(tmp_path, command, torch_does, ends):
    (tmp_path / "torch.py").write_text(torch_does)
    line = [sys.executable, "-m", *f"gdd_fast.{command}".format(tmp_path / "run").split()]
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    found = subprocess.run(line, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True)
    status, message = ends
    assert found.returncode == status
    assert found.stderr.startswith(message) and found.stderr.count("\n") == 1 and not found.stdout


@pytest.mark.parametrize("gone", ["ctrl-c", "reader"])
def test_info_ends_as_other_commands_do(tmp_path, gone):
    """What it lacks does not end it; this does."""
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)" if gone == "ctrl-c" else "raise ImportError"
    )
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", "gdd_fast.info"]
    found = subprocess.run(line, env=env, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == ((130, "interrupted\n") if gone == "ctrl-c" else (141, ""))
