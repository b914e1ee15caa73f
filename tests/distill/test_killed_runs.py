"""SIGKILL at the moments that could matter: before any step on the files of a run. The same command then goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# Runs a command in forks of itself, as to start Python with torch takes longer than the run. The audit hook sees every
# file that is opened, renamed, linked or removed.
SCRIPT = """
import json, os, shutil, signal, sys, traceback
from pathlib import Path
import torch
from gdd_fast import pretrain, train
from gdd_fast.training import output

torch.set_num_threads(1)
output.find_spec = lambda name: None  # no TensorBoard, whose import takes seconds
folder, name, moments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
main = {"train": train, "pretrain": pretrain}[name].main

def status(run, kill_at):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir") and str(run) in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    try:
        main([*sys.argv[4:], "--run-dir", str(run)])
        (folder / "seen").write_text(str(seen))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

found = {"whole": status(folder / "whole", 0), "killed": {}}
steps = int((folder / "seen").read_text())
for number in range(moments):
    at = max(1, int(steps * (number + 0.8) / moments))
    run = folder / f"killed-{at}"
    found["killed"][at] = [status(run, at), status(run, 0)]
print(json.dumps(found))
"""


def files(run: Path) -> dict[str, bytes]:
    """What a run leaves, but for the times in metrics.jsonl and on the page, and what the checkpoint says of paths."""
    names = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".png", ".safetensors")]
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in names}
    for name in found:
        if name.endswith(".safetensors"):  # its tensors; the header holds paths, and entries in any order
            found[name] = found[name][8 + int.from_bytes(found[name][:8], "little") :]
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("minutes", "images_per_second", "peak_host_gib")
    found["metrics"] = json.dumps([{k: v for k, v in line.items() if k not in timed} for line in kept]).encode()
    return found


@pytest.mark.parametrize(
    ("command", "moments"),
    [
        pytest.param("train", 1, marks=pytest.mark.slow),
        pytest.param("pretrain", 1, marks=pytest.mark.slow),
        pytest.param("train", 50, marks=pytest.mark.slow),
        pytest.param("pretrain", 50, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(inputs, tmp_path, command, moments):
    from tiny_run import tiny_flags

    short = {"duration_mimg": 16e-6, "tick_kimg": 0.004, "checkpoint_ticks": 2}
    if command == "train":
        flags = tiny_flags(inputs, keep_checkpoints=2, **short)
        place = flags.index("--run-dir")
        del flags[place : place + 2]
    else:
        given = {
            "data": inputs / "data.zip",
            "model_channels": 8,
            "num_blocks": 1,
            "batch": 4,
            "device": "cpu",
            **short,
        }
        flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, command, str(moments), *flags],
        cwd=TESTS.parent, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["whole"] == 0 and len(found["killed"]) == moments, told.stderr
    whole = files(tmp_path / "whole")
    for at, statuses in found["killed"].items():
        assert statuses == [-9, 0], f"killed before step {at} on files: {told.stderr[-2000:]}"
        assert files(tmp_path / f"killed-{at}") == whole, f"killed before step {at} on files"
        assert not list((tmp_path / f"killed-{at}").glob(".*"))
