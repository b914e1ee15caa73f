"""The training loop: iterate, log at ticks, save, stop when asked, resume. What an iteration does is the task's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gdd_fast.config import differences
from gdd_fast.distill import checkpoint
from gdd_fast.distill.checkpoint import Checkpoint
from gdd_fast.distill.distributed import World
from gdd_fast.distill.output import Averages, RunOutput
from gdd_fast.distill.signals import StopRequest
from gdd_fast.errors import CheckpointError, DivergedError
from gdd_fast.files import atomic_write

CHECKPOINT = "checkpoint.safetensors"


class Task(Protocol):
    """Something that trains. `images` is always the number of real images seen before the call."""

    batch: int
    averages: Averages

    def iteration(self, images: int) -> None: ...
    def tick(self, images: int) -> dict[str, float]:
        """Extra metrics and files of a tick; main rank only."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Sections of tensors and JSON values to save. Called on every rank."""

    def restore(self, saved: Checkpoint) -> None: ...
    def export(self, run_dir: Path) -> None:
        """Write the network that the run is for; main rank only."""


@dataclass(frozen=True)
class Schedule:
    """Length of a run and its ticks, in images and ticks."""

    total: int
    tick: int
    checkpoint_ticks: int


def run(task: Task, run_dir: Path, config: dict[str, Any], schedule: Schedule, world: World) -> bool:
    """Train until `schedule.total` images, from `run_dir`'s checkpoint if there is one; False if stopped before.

    Writes config.json, metrics.jsonl, the checkpoint and the task's own files. The state is saved at the end, on
    SIGINT or SIGTERM after the iteration in progress, and before a `DivergedError` is passed on.
    """
    images = _resume(task, run_dir, config)
    output = RunOutput(run_dir, schedule.total, images, enabled=world.is_main)
    if world.is_main:
        with atomic_write(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
    if images:
        output.say(f"Resuming {run_dir} at {images:,} of {schedule.total:,} images.")

    def save() -> None:
        sections, values = task.state()
        if world.is_main:
            checkpoint.save(run_dir / CHECKPOINT, sections, {**values, "images": images, "config": config})
            task.export(run_dir)
        world.barrier()

    def tick() -> None:
        means = task.averages.take()
        if world.is_main:
            output.metrics(images, {**means, **task.tick(images)})

    stopped = False
    saved_at = images
    try:
        with StopRequest() as stop:
            while images < schedule.total and not stopped:
                try:
                    task.iteration(images)
                except DivergedError:
                    save()
                    raise
                before, images = images, images + task.batch
                output.advance(task.batch)
                stopped = world.any(stop.received)
                if images // schedule.tick > before // schedule.tick or images >= schedule.total:
                    tick()
                    if images // schedule.tick % schedule.checkpoint_ticks == 0:
                        save()
                        saved_at = images
            if images != saved_at:
                save()
    finally:
        output.close()
    return not stopped


def _resume(task: Task, run_dir: Path, config: dict[str, Any]) -> int:
    """Restore the task from the run folder's checkpoint, if any; the images it had seen."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        return 0
    saved = checkpoint.load(path)
    changed = differences(saved.values["config"], config)
    if changed:
        raise CheckpointError(
            f"{run_dir} holds a run with other settings ({'; '.join(changed)}); choose another --run-dir or delete it"
        )
    task.restore(saved)
    return saved.values["images"]
