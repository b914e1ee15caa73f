"""`sample` and `evaluate` under torchrun: the files and values of one process, to the byte; and a process that dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_network, write_inputs

from gdd_fast.models.files.save import save_network
from gdd_fast.ranks import ALONE, World

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

# Several commands in one process each, as to start one takes longer than all of them. An interrupted sampling is among
# them: its first images are of a process of its own.
COMMANDS = """
import sys
from pathlib import Path
import torch
from gdd_fast import evaluate, sample
from gdd_fast.ranks import is_main
from gdd_fast.sampling import resume

folder, inputs = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
net, data = ["--net", str(inputs / "labelled"), "--device", "cpu"], ["--data", str(inputs / "data.zip")]
some = ["--seeds", "3-24", "--batch", "4", "--sigma-max", "80"]
sample.main([*net, *some, "--out", str(folder / "images.zip"), "--grid", str(folder / "grid.png")])
sample.main([*net, *some[:4], "--sampler", "heun", "--steps", "3", "--s-churn", "5", "--out", str(folder / "heun.npz")])
if is_main():
    keep, resume.ResumableWriter.finish = resume.ResumableWriter.finish, lambda self: None
    keep_put, puts = resume.ResumableWriter.put, []
    def put(self, seeds, *rest):
        puts.append(seeds)
        if len(puts) <= 2:
            keep_put(self, seeds, *rest)
    resume.ResumableWriter.put = put
sample.main([*net, *some, "--out", str(folder / "resumed")])
if is_main():
    resume.ResumableWriter.put, resume.ResumableWriter.finish = keep_put, keep
sample.main([*net, *some, "--out", str(folder / "resumed")])
measured = "--images 22 --batch 4 --metrics fd@pixels,kid@pixels,nn@pixels --sigma-max 80 --json"
evaluate.main([*net, *data, *measured.split(),
               "--nn-sheet", str(folder / "nn.png"), "--held-out", data[1]])
evaluate.main(["ref", *data, "--features", "pixels", "--with-features", "--batch", "5", "--device", "cpu",
               "--out", str(folder / "ref.npz")])
"""


def torchrun(*command, processes):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*start, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    save_network(tiny_network(label_dim=3), folder / "labelled")
    (folder / "commands.py").write_text(COMMANDS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_what_one_does(inputs, tmp_path, processes):
    one, several = tmp_path / "one", tmp_path / "several"
    told = subprocess.run(
        [sys.executable, inputs / "commands.py", one, inputs],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    shared = torchrun(inputs / "commands.py", several, inputs, processes=processes)
    assert shared.returncode == 0, shared.stderr
    assert (
        files(several) == files(one)
        and {"images.zip", "grid.png", "heun.npz", "nn.png", "ref.npz"} <= files(one).keys()
    )
    assert len([name for name in files(one) if name.startswith("resumed/")]) == 22 + 1  # and the labels
    assert shared.stdout.count("22 images in") == 3 and shared.stdout.count("statistics of 24") == 1
    values = [json.loads(line) for out in (told.stdout, shared.stdout) for line in out.splitlines() if line[:1] == "{"]
    assert len(values) == 2 and values[0] == values[1] and len(values[0]["metrics"]) > 3


# What one of two processes does to the other: it ends, or is killed, at its second batch of images.
DEATH = """
import os, signal, sys, torch
from pathlib import Path
from gdd_fast import sample
from gdd_fast.errors import WeightsError
from gdd_fast.ranks import is_main
how, keep = sys.argv.pop(1), sample.launch
def launch(*args, **kwargs):
    for number, batch in enumerate(keep(*args, **kwargs)):
        if number and is_main() == (how == "main"):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise WeightsError("its third eye is blind")
        yield batch
sample.launch = launch
sample.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["main", "other", "killed"])
def test_a_process_that_dies_ends_them_all(inputs, tmp_path, how):
    (tmp_path / "death.py").write_text(DEATH)
    flags = ["--net", inputs / "teacher", "--seeds", "0-23", "--batch", "4", "--sigma-max", "80", "--device", "cpu"]
    begun = time.monotonic()
    told = torchrun(tmp_path / "death.py", how, *flags, "--out", tmp_path / "images.zip", processes=2)
    assert told.returncode == 1 and time.monotonic() - begun < 120
    assert ("exitcode: -9" if how == "killed" else "error: its third eye is blind") in told.stderr.replace(
        " :", ":"
    ).replace("  ", " ")
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in told.stderr
    assert not (tmp_path / "images.zip").exists()
    again = torchrun("-m", "gdd_fast.sample", *flags, "--out", tmp_path / "images.zip", processes=2)
    assert again.returncode == 0, again.stderr


def test_shares_are_whole_batches():
    items = list(range(11))
    assert [World(rank, 3, torch.device("cpu")).share(items, 2) for rank in range(3)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10],
    ]
    assert ALONE.share(items, 4) == items
    whole = list(ALONE.in_order(iter([torch.zeros(2)])))
    assert len(whole) == 1 and np.array_equal(whole[0], np.zeros(2))
