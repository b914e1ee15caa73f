"""Before a distillation: a teacher that predicts noise learns to predict v, in a folder of the run's."""

import time
from dataclasses import replace
from pathlib import Path

from gdd_fast.config import AUTO, TrainConfig, default_settings, given, to_dict
from gdd_fast.distill.pretraining import TEACHER, PretrainConfig, Pretraining
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ranks import World
from gdd_fast.training import loop

FOLDER = "velocity"
SMALL = 10_000_000  # parameters up to which the demo's learning rate is borne; DDPM trained larger ones at 2e-4


def is_wanted(config: TrainConfig, generator: Preconditioned) -> bool:
    """Whether the run begins with this stage: the settings ask for it and the generator's network can learn it."""
    return config.generator.velocity_kimg > 0 and generator.learns_velocity


def description(config: TrainConfig, generator: Preconditioned) -> str:
    """What the stage does, in a line; empty for a run without it."""
    if not is_wanted(config, generator):
        return ""
    images = round(config.generator.velocity_kimg * 1e3)
    return f"the teacher, which predicts noise, learns to predict v for {images:,} images"


def settings(config: TrainConfig, generator: Preconditioned) -> PretrainConfig:
    """What `gdd_fast.pretrain` is told; its run folder is in the distillation's."""
    run, length = config.run, config.generator.velocity_kimg / 1e3
    return PretrainConfig(
        teacher=config.generator.teacher,
        data=given(config.data.data, "--data"),
        run_dir=config.run_dir / FOLDER,
        cond=config.data.cond,
        x_flip=config.data.x_flip,
        workers=config.data.workers,
        data_memory_gib=config.data.data_memory_gib,
        batch=run.batch,
        batch_gpu=None if run.batch_gpu in (None, AUTO) else int(run.batch_gpu),
        lr=1e-3 if sum(p.numel() for p in generator.parameters()) <= SMALL else 2e-4,
        lr_rampup_kimg=config.generator.velocity_kimg / 10,
        ema_halflife_mimg=length / 8,
        ema_rampup=0.25,
        duration_mimg=length,
        precision="bf16" if config.generator.g_precision == "bf16" else "fp32",
        seed=run.seed,
        tick_kimg=config.generator.velocity_kimg / 5,
        checkpoint_ticks=1,
        **{name: getattr(run, name) for name in ("device", "backend", "async_checkpoints", "max_hours")},
        **{name: getattr(run, name) for name in ("debug_finite", "max_skipped_steps")},
    )


def run(config: TrainConfig, generator: Preconditioned, world: World) -> tuple[loop.Outcome, Path, float]:
    """Train, or go on, or find it done: how it ended, the folder of its network, and the seconds that it took.

    Raises what `loop.run` raises.
    """
    asked = settings(config, generator)
    if world.is_main:
        print(f"First, in {asked.run_dir}: {description(config, generator)}.")
    began = time.monotonic()
    task = Pretraining(asked, world)
    outcome = loop.run(task, asked.run_dir, to_dict(asked), loop.Schedule.of(asked), world, default_settings(asked))
    return outcome, asked.run_dir / TEACHER, time.monotonic() - began


def remaining(schedule: loop.Schedule, seconds: float) -> loop.Schedule:
    """`schedule` of a run of which so many seconds are over."""
    return replace(schedule, seconds=max(0.0, schedule.seconds - seconds))
