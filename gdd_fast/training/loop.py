"""The training loop: iterate, log at ticks, save, stop on request, resume. The task defines an iteration."""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from gdd_fast.config import ADJUSTABLE, RESUMABLE, differences
from gdd_fast.errors import CheckpointError, ConfigError, DivergedError
from gdd_fast.files import atomic_write, check_name, remove_leftovers_within
from gdd_fast.ranks import World
from gdd_fast.settings import LoopSettings
from gdd_fast.signals import StopRequest
from gdd_fast.training import checkpoint
from gdd_fast.training.behind import Behind
from gdd_fast.training.checkpoint import Checkpoint, Sections
from gdd_fast.training.output import Averages, RunOutput

CHECKPOINT = "checkpoint.safetensors"
DIVERGED = "diverged.safetensors"
"""The state in which a run diverged, for inspection only. Runs resume from `CHECKPOINT`."""
TIME_IS_UP = 1000  # stands for a signal where the ranks agree on one; no signal has this number


class Task(Protocol):
    """A training. `images` is always the number of real images seen before the call.

    contents: digests of what the flags of these names gave; a run resumes only with the same. remedy: words that name
    the flags that help a run that diverged.
    """

    batch: int
    averages: Averages
    contents: dict[str, str]
    remedy: str

    def iteration(self, images: int) -> None: ...
    def tick(self, images: int) -> dict[str, float]:
        """Extra metrics and files of a tick. Called on every rank; only the main one's result is used."""

    def state(self) -> tuple[Sections, dict[str, Any]]:
        """Sections of tensors and JSON values to save. Called on every rank."""

    def restore(self, saved: Checkpoint) -> None: ...
    def export(self, run_dir: Path, sections: Sections) -> None:
        """Write the run's resulting network from the tensors that `state` gave; main rank only.

        Called from another thread during training: it must not read anything of the task that training changes.
        """

    def exported(self, run_dir: Path) -> bool:
        """Whether what `export` would write exists. Called on every rank; only the main one's result is used."""

    def close(self) -> None:
        """End the processes that belong to the task."""


@dataclass(frozen=True)
class Schedule:
    """Length of a run, of a tick and between checkpoints, in images; how many checkpoints to keep; seconds to run."""

    total: int
    tick: int
    checkpoint: int
    at_start: bool = False
    """Whether a tick comes before the first iteration."""
    keep: int = 1
    seconds: float = math.inf
    behind: bool = True
    """Whether training continues while a checkpoint is written."""

    @classmethod
    def of(cls, run: LoopSettings, *, at_start: bool = False) -> "Schedule":
        tick = max(1, round(run.tick_kimg * 1e3))
        seconds = math.inf if run.max_hours is None else 3600 * run.max_hours
        total = round(run.duration_mimg * 1e6)
        every = tick * run.checkpoint_ticks
        return cls(total, tick, every, at_start, run.keep_checkpoints, seconds, run.async_checkpoints)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: images seen in all, those seen in this call, and the signal that stopped it."""

    images: int
    new_images: int
    signal: int = 0
    out_of_time: bool = False
    """Whether `Schedule.seconds` ran out before the run was finished."""

    @property
    def exit_status(self) -> int:
        """Exit status of the process: 0 for a finished run, 128 + a signal's number, 75 (EX_TEMPFAIL) if time ran
        out."""
        return 128 + self.signal if self.signal else os.EX_TEMPFAIL if self.out_of_time else 0


def run(
    task: Task,
    run_dir: Path,
    config: dict[str, Any],
    schedule: Schedule,
    world: World,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    log: Sequence[str] = ("auto",),
) -> Outcome:
    """Train until `schedule.total` images, from `run_dir`'s checkpoint if there is one.

    Writes config.json, metrics.jsonl, the checkpoint and the task's own files. The state is saved at the end, and on
    SIGINT or SIGTERM after the iteration in progress; a signal that arrives while the last state is saved counts too.
    With `schedule.behind`, a checkpoint is a copy of the state that is written while training continues: if it cannot
    be written, the run ends at the next one; the last is waited for. A finished run is left untouched, except that a
    missing or outdated export is made again (the process was killed before it, or someone removed it). A run that
    diverges leaves its state beside the last checkpoint, from which it can resume with other `ADJUSTABLE` settings;
    such changes are printed, and written to metrics.jsonl. `defaults` fill in settings that a checkpoint of an earlier
    version lacks. `log`: see `training.loggers`.

    Raises:
        CheckpointError: the checkpoint cannot be read or written, or belongs to a run with other settings or contents.
        ConfigError: the run folder was moved or deleted while the run trained in it.
        DivergedError: see `StepGuard`; or a state to be saved is not finite.
    """
    if world.is_main:
        remove_leftovers_within(run_dir)  # even for a finished run: it may have been killed after its last rename
    images, changes = _resume(task, run_dir, config, schedule, world, defaults)
    started_at = images
    if images and not task.exported(run_dir) and world.is_main:
        task.export(run_dir, checkpoint.load(run_dir / CHECKPOINT).sections())
    if images >= schedule.total:
        task.close()
        return Outcome(images, 0)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
    output = RunOutput(run_dir, schedule.total, images, enabled=world.is_main, log=log, config=config)
    if images:
        output.say(f"Resuming {run_dir} at {images:,} of {schedule.total:,} images.")
    if changes:
        output.changes(images, changes)

    behind = Behind()
    folder = run_dir.stat() if world.is_main else None

    def check_folder() -> None:
        """Otherwise later writes would create a folder with half of a run in it, which nobody has locked."""
        if folder is not None and not (run_dir.is_dir() and os.path.samestat(folder, run_dir.stat())):
            raise ConfigError(
                f"{run_dir} was moved or deleted while this run trained in it; its last checkpoint went too"
            )

    def state() -> tuple[Sections, dict[str, Any]]:
        sections, values = task.state()
        values = {**values, "images": images, "config": config, "contents": task.contents}
        return sections, {**values, "processes": world.size}

    def diverged(error: str, sections: Sections, values: dict[str, Any]) -> DivergedError:
        if world.is_main:
            checkpoint.save(run_dir / DIVERGED, sections, values)
            behind.wait()
        return DivergedError(f"{error}. {_advice(task, run_dir, saved_at)}")

    def save() -> None:
        check_folder()
        sections, values = state()
        broken = _not_finite(sections, world)
        if broken:
            raise diverged(f"{broken} holds NaN or infinite values after {images:,} images", sections, values)
        if not world.is_main:
            return
        if schedule.behind:
            behind.wait()  # before making one more copy
            sections = checkpoint.copied(sections)
        behind.start(partial(_write, task, run_dir, sections, values, saved_at, schedule.keep))
        if not schedule.behind:
            behind.wait()

    def tick() -> None:
        check_folder()
        means = task.averages.take()
        output.metrics(images, {**means, **task.tick(images)})

    stopped_by, saved_at = 0, images
    time_is_up = time.monotonic() + schedule.seconds
    try:
        with StopRequest(announce=world.is_main) as stop:
            if schedule.at_start and not images:
                tick()
            while images < schedule.total and not stopped_by:
                try:
                    task.iteration(images)
                except DivergedError as error:
                    raise diverged(str(error), *state()) from None
                before, images = images, images + task.batch
                output.advance(task.batch)
                stopped_by = world.largest(stop.signal or (TIME_IS_UP if time.monotonic() >= time_is_up else 0))
                if images // schedule.tick > before // schedule.tick or images >= schedule.total:
                    tick()
                if images // schedule.checkpoint > before // schedule.checkpoint:
                    save()
                    saved_at = images
            if images != saved_at:
                save()
            behind.wait()
            signal = world.largest(stop.signal)  # even one that came meanwhile; waits for the main rank
    finally:
        unwritten = behind.close()
        if unwritten is not None:
            output.say(f"The checkpoint of {saved_at:,} images was not written: {unwritten}")
        output.close()
        task.close()
    out_of_time = stopped_by == TIME_IS_UP and images < schedule.total
    return Outcome(images, images - started_at, signal, out_of_time)


def stored_values(run_dir: Path) -> dict[str, Any] | None:
    """The JSON values of the checkpoint in `run_dir`, `images`, `config` and `contents` among them; None without one.

    Raises `CheckpointError` if it cannot be read or is not a run's; `ConfigError` if its path is not UTF-8.
    """
    path = run_dir / CHECKPOINT
    check_name(path)
    if not path.exists():
        return None
    values = checkpoint.load_values(path)
    kinds = {"images": int, "config": dict, "contents": dict}
    if not isinstance(values, dict) or any(type(values.get(name)) is not kind for name, kind in kinds.items()):
        raise CheckpointError(
            f"{path} does not say which run it belongs to; move it away to start the run from the beginning"
        )
    return values


def check_same_run(
    run_dir: Path,
    config: dict[str, Any],
    contents: dict[str, str],
    total: int,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """The values of the checkpoint in `run_dir`; None without one.

    Raises `CheckpointError` if it belongs to a run that does not have these settings and contents.
    """
    values = stored_values(run_dir)
    if values is None:
        return None
    elsewhere = "choose another --run-dir or move it away"
    finished = values["images"] >= total  # then its result must not pass for that of other settings
    changed = differences(values["config"], config, RESUMABLE if finished else RESUMABLE | ADJUSTABLE, defaults)
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        kind = "a finished run" if finished else "a run"
        raise CheckpointError(
            f"{run_dir} holds {kind} with other settings ({'; '.join(changed[:5])}{more}); {elsewhere}"
        )
    for name in contents | values["contents"]:
        if values["contents"].get(name) != contents.get(name):
            raise CheckpointError(
                f"{run_dir} holds a run with another --{name}: its path may change, its content may not; {elsewhere}"
            )
    return values


def _resume(
    task: Task,
    run_dir: Path,
    config: dict[str, Any],
    schedule: Schedule,
    world: World,
    defaults: Mapping[str, Any],
) -> tuple[int, list[str]]:
    """Restore the task from the run folder's checkpoint, if any; the images it had seen, and changed settings."""
    values = check_same_run(run_dir, config, task.contents, schedule.total, defaults)
    images, changes = 0, []
    if values is not None:
        task.restore(checkpoint.load(run_dir / CHECKPOINT))
        broken = _not_finite(task.state()[0], world)
        if broken:
            raise CheckpointError(
                f"{run_dir / CHECKPOINT} holds NaN or infinite values in {broken}; move it away to start the run from "
                "the beginning, or put an earlier one in its place"
            )
        images, changes = values["images"], differences(values["config"], config, defaults=defaults)
        if values.get("processes", world.size) != world.size:
            changes.append(f"processes: {values['processes']} -> {world.size}")
    if any(images != other.item() for other in world.gather(torch.tensor([images]))):
        raise CheckpointError(f"not all processes find the same checkpoint in {run_dir}; it must be on a shared disk")
    return images, changes


def _not_finite(sections: Sections, world: World) -> str:
    """The main rank's `checkpoint.not_finite`, on every rank: the others may hold only shards, or nothing."""
    return world.from_main(checkpoint.not_finite(sections) if world.is_main else "")


def _write(task: Task, run_dir: Path, sections: Sections, values: dict[str, Any], saved_at: int, keep: int) -> None:
    """Write a checkpoint and its export. `saved_at`: the images of the previous checkpoint."""
    _keep_earlier(run_dir, saved_at, values["images"], keep)
    checkpoint.save(run_dir / CHECKPOINT, sections, values)
    task.export(run_dir, sections)


def _keep_earlier(run_dir: Path, saved_at: int, images: int, keep: int) -> None:
    """Give the checkpoint of `saved_at` images, about to be replaced, a permanent name; keep the last `keep - 1`.

    A file of that name is either this checkpoint, if a process was killed before writing the new one, or from abandoned
    work, and is replaced.
    """
    newest, kept = run_dir / CHECKPOINT, run_dir / f"checkpoint-{saved_at:09d}.safetensors"
    if keep > 1 and newest.exists() and not (kept.exists() and kept.samefile(newest)):
        with atomic_write(kept) as temporary:
            try:
                os.link(newest, temporary)
            except OSError:  # not every file system has hard links
                shutil.copyfile(newest, temporary)
    earlier = {path.stem.partition("-")[2]: path for path in run_dir.glob("checkpoint-*.safetensors")}
    numbers = sorted(int(number) for number in earlier if number.isdecimal() and int(number) < images)
    for number in numbers[: max(0, len(numbers) - keep + 1)] if keep > 1 else []:
        earlier[f"{number:09d}"].unlink()


def _advice(task: Task, run_dir: Path, saved_at: int) -> str:
    """What to do about a run that diverged."""
    start = f"resumes from the checkpoint of {saved_at:,} images" if saved_at else "starts again"
    return f"The state is in {run_dir / DIVERGED}. The same command with {task.remedy} {start}"
