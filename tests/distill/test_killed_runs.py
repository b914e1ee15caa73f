"""SIGKILL at any moment of a command: the same command then goes on, and ends with the same bits.

Half of the moments are steps on files, spread over all that the command takes; half are random times.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# Runs a command in forks of itself, as to start Python with torch takes longer than the run. The audit hook sees every
# file that is opened, renamed, linked or removed.
SCRIPT = """
import importlib.util, json, os, random, signal, sys, threading, time, traceback
from pathlib import Path
import torch
from gdd_fast.distill import comparison
from gdd_fast.training import loggers

if importlib.util.find_spec("torchvision"):
    sys.path.insert(0, "tests")
    import vision_libraries  # without which diffusers is not imported, where torchvision was built for another torch
torch.set_num_threads(1)
loggers.find_spec = lambda name: None  # no TensorBoard, whose import takes seconds
comparison.FEATURES = ("pixels",)  # no distance between 1,280 features
comparison.PANEL_IMAGES = 4
folder, name, moments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
main = importlib.import_module(f"gdd_fast.{name}").main
STEPS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir")

def status(run, kill_at=0, seconds=None):
    child = os.fork()
    if child:
        if seconds is not None:
            threading.Timer(seconds, os.kill, (child, signal.SIGKILL)).start()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in STEPS and str(run) in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    print("RUN", run.name, file=sys.stderr, flush=True)
    code = 1
    try:
        main([argument.replace("RUN", str(run)) for argument in sys.argv[4:]])
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    (folder / "seen").write_text(str(seen))
    os._exit(code)

found = {"killed": {}}
begun = time.monotonic()
found["whole"] = status(folder / "whole")
took = time.monotonic() - begun
steps = int((folder / "seen").read_text())
times = random.Random(0)
for number in range(moments):
    run = folder / f"killed-{number}"
    if number % 2:
        killed = status(run, seconds=times.random() * took)
    else:
        killed = status(run, kill_at=max(1, int(steps * (number + 0.8) / moments)))
    found["killed"][run.name] = [killed, status(run)]
print(json.dumps(found))
"""


def files(run: Path) -> dict[str, bytes]:
    """What a run leaves, but for the times in metrics.jsonl and on the page, and what the checkpoint says of paths."""
    kept = (".png", ".safetensors", ".zip", ".npz")
    names = [path for path in run.rglob("*") if path.suffix in kept and path.is_file()]
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in names}
    for name in found:
        if name.endswith(".safetensors"):  # its tensors; the header holds paths, and entries in any order
            found[name] = found[name][8 + int.from_bytes(found[name][:8], "little") :]
    if (run / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("minutes", "images_per_second", "peak_host_gib")
        found["metrics"] = json.dumps([{k: v for k, v in line.items() if k not in timed} for line in lines]).encode()
    return found


TRAINING = {"duration_mimg": 16e-6, "tick_kimg": 0.004, "checkpoint_ticks": 2}
FIRST = {"velocity_kimg": 0.016}


def flags_of(command: str, inputs: Path) -> list[str]:
    """Of a short run that writes to the folder RUN."""
    from tiny_run import tiny_flags

    return {
        "train": tiny_flags(inputs, run_dir="RUN", keep_checkpoints=2, evaluate_images=4, **TRAINING),
        "train in two stages": tiny_flags(
            inputs, teacher=inputs / "ddpm", velocity_kimg=0.016, run_dir="RUN", **TRAINING
        ),
        "pretrain": f"--run-dir RUN --data {inputs}/data.zip --model-channels 8 --num-blocks 1 --batch 4 --device cpu "
        "--duration-mimg 16e-6 --tick-kimg 0.004 --checkpoint-ticks 2".split(),
        "prepare": f"--source {inputs}/data.zip --dest RUN/small.zip --resolution 8".split(),
        "sample": f"--net {inputs}/teacher --seeds 0-23 --batch 4 --sigma-max 80 --device cpu --out RUN/images.zip "
        "--grid RUN/grid.png".split(),
        "convert": f"{inputs}/teacher RUN/network".split(),
        "evaluate": f"ref --data {inputs}/data.zip --features pixels --with-features --out RUN/real.npz".split(),
    }[command]


@pytest.mark.parametrize(
    ("command", "moments"),
    [
        ("prepare", 4),
        *(
            pytest.param(command, 50, marks=pytest.mark.slow)
            for command in ("train", "train in two stages", "pretrain", "prepare", "sample", "convert", "evaluate")
        ),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(inputs, tmp_path, command, moments):
    if "two stages" in command:
        pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
        pytest.importorskip("diffusers_teachers").write_ddpm(inputs)
    program = command.split()[0]
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, program, str(moments), *flags_of(command, inputs)],
        cwd=TESTS.parent, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["whole"] == 0 and len(found["killed"]) == moments, told.stderr
    whole = files(tmp_path / "whole")
    assert len(whole) > 0
    killed = 0
    for name, (first, second) in found["killed"].items():
        said = told.stderr.rpartition(f"RUN {name}\n")[2].partition("RUN killed")[0]
        killed += first == -9
        # a command that was killed behind its last step finds its output there, and does not write over it
        assert second == 0 or (second == 2 and "exists" in said and program not in ("train", "pretrain")), (name, said)
        assert files(tmp_path / name) == whole, (name, said)
        hidden = [path for path in (tmp_path / name).rglob(".*") if path.is_file() or not second]
        assert not hidden, (name, hidden)  # killed between the last two steps, the empty folder of the first is left
    assert killed >= moments // 3
