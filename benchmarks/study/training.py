"""Running the project's own commands one after the other within a time, each going on where it stopped."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.folders import Folders
from benchmarks.study.plans import Flags, Run
from gdd_fast.distill.pretraining import TEACHER
from gdd_fast.models.files.load import RUN_GENERATOR
from gdd_fast.signals import StopRequest
from gdd_fast.training.checkpoint import load_values
from gdd_fast.training.loop import CHECKPOINT

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.5


class OutOfTime(Exception):
    """The budget is spent or the study was told to stop; what was running has saved its state."""


class Budget:
    """Until when to work."""

    def __init__(self, minutes: float | None, stop: StopRequest) -> None:
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.stop = stop

    def check(self) -> None:
        if self.stop.signal or time.monotonic() >= self.end:
            raise OutOfTime


def arguments(flags: Flags) -> list[str]:
    """Flags of a command from settings by their names."""
    found = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple | list):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(value)]
    return found


def command(name: str, flags: Flags) -> list[str]:
    return [sys.executable, "-m", f"gdd_fast.{name}", *arguments(flags)]


def call(line: Sequence[str], log: Path, budget: Budget) -> int:
    """The exit status of a command, whose output goes to the end of `log`.

    It is told to stop, and waited for, when the budget is spent: OutOfTime.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        output.write("\n" + " ".join(line[1:]) + "\n")
        output.flush()
        # a session of its own: a Ctrl-C of the terminal reaches it once, through here
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, cwd=_ROOT, start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                budget.check()
                time.sleep(_POLL_SECONDS)
        except OutOfTime:
            process.terminate()
            process.wait()
            raise
    return process.returncode


def train(folders: Folders, only: Sequence[str], budget: Budget) -> None:
    """Everything of the study that is not trained yet: data, teacher, then all runs from milestone to milestone.

    The runs reach the first milestone one after the other before any goes on to the second, so that what there is at
    any time compares.
    """
    prepare(folders, budget)
    teach(folders, budget)
    for run, milestone in order(folders.study.all_runs(), only):
        # a run that went by a milestone, which the plan has since then, cannot go back to it
        if milestone <= max(folders.reached(run), default=0) or folders.failure(run).exists():
            continue
        budget.check()
        distill(folders, run, milestone, budget)


def order(runs: Sequence[Run], only: Sequence[str]) -> Iterator[tuple[Run, int]]:
    """Runs and milestones, in which order they are trained. `only` names runs; none is all."""
    chosen = [run for run in runs if not only or run.name in only]
    for milestone in sorted({m for run in chosen for m in run.milestones}):
        yield from ((run, milestone) for run in chosen if milestone in run.milestones)


def prepare(folders: Folders, budget: Budget) -> None:
    """The prepared data sets."""
    for split in ("train", "test"):
        source, dest = getattr(folders.study, split), folders.data(split)
        if dest in source.names or Path(dest).exists():
            continue
        line = command("prepare", {"source": folders.asset(source.names), "dest": dest, **source.flags})
        _expect(call(line, folders.root / "prepare.log", budget), folders.root / "prepare.log")


def teach(folders: Folders, budget: Budget) -> None:
    """The teacher."""
    flags, folder = folders.study.teacher, folders.teacher_run
    if flags is None or _images(folder) >= round(flags["duration_mimg"] * 1e6):
        return
    line = command("pretrain", {"data": folders.data("train"), "run_dir": folder, **flags})
    _expect(_timed(line, folders, folder, budget), folder / "log.txt")


def distill(folders: Folders, run: Run, milestone: int, budget: Budget) -> None:
    """Train `run` to `milestone` and keep the averaged generator. A run that fails is marked and passed over."""
    folder = folders.run(run)
    line = [*command("train", {"preset": folders.study.preset}), *arguments(flags_of(folders, run, milestone))]
    if _timed(line, folders, folder, budget):
        folders.failure(run).write_text((folder / "log.txt").read_text()[-2000:])
        return
    snapshot = folders.snapshot(run, milestone)
    partial = snapshot.with_name(f".{snapshot.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / RUN_GENERATOR, partial)
    partial.rename(snapshot)


def flags_of(folders: Folders, run: Run, milestone: int) -> dict[str, Any]:
    """Of `gdd_fast.train`, beside --preset."""
    flags = {**folders.study.base, **run.flags}
    if "backbone_weights" in flags:
        flags["backbone_weights"] = tuple(w.format(assets=folders.assets) for w in flags["backbone_weights"])
    return {
        "data": folders.data("train"),
        "teacher": folders.teacher,
        "run_dir": folders.run(run),
        "duration_mimg": milestone / 1e6,
        **flags,
    }


def _images(folder: Path) -> int:
    path = folder / CHECKPOINT
    return load_values(path)["images"] if path.exists() and (folder / TEACHER).exists() else 0


def _timed(line: Sequence[str], folders: Folders, folder: Path, budget: Budget) -> int:
    """As `call`, leaving a line of cost: processor and wall seconds, start of the process included."""
    folder.mkdir(parents=True, exist_ok=True)
    cpu, wall = _children_seconds(), time.monotonic()
    try:
        return call(line, folder / "log.txt", budget)
    finally:
        seconds = {"cpu_s": round(_children_seconds() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
        values = load_values(folder / CHECKPOINT) if (folder / CHECKPOINT).exists() else {"images": 0}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        with folders.cost(folder).open("a") as file:
            file.write(json.dumps({"images": values["images"], **seconds, "device": device}) + "\n")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _expect(status: int, log: Path) -> None:
    if status:
        raise SystemExit(f"a command failed with status {status}; {log} ends:\n{log.read_text()[-1500:]}")
