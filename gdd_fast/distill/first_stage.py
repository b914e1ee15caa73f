"""A stage before distillation: a teacher that predicts noise learns to predict v, in a subfolder of the run."""

import time
from dataclasses import replace

from gdd_fast.config import AUTO, TrainConfig, default_settings, given, loggers, to_dict
from gdd_fast.distill.components import Components, load_teacher
from gdd_fast.distill.pretraining import TEACHER, PretrainConfig, Pretraining
from gdd_fast.distill.velocity import with_velocity
from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ranks import World
from gdd_fast.training import loop

FOLDER = "velocity"
SMALL = 10_000_000  # most parameters for which a learning rate of 1e-3 is stable; DDPM trained larger networks at 2e-4


def is_wanted(config: TrainConfig, generator: Preconditioned) -> bool:
    """Whether the run begins with this stage: the settings ask for it and the generator's network can learn v."""
    return _images(config) > 0 and generator.learns_velocity


def check(config: TrainConfig, generator: Preconditioned) -> None:
    """Raise ConfigError if the settings ask for this stage but the teacher cannot learn v."""
    if _images(config) > 0 and not generator.learns_velocity:
        raise ConfigError(
            f"--velocity-kimg: {config.generator.teacher} is not a diffusers network that predicts noise under a "
            "schedule defined by betas; leave it out"
        )


def form(config: TrainConfig) -> Preconditioned:
    """The network that the stage would train, with the teacher's weights: for runs that get other weights later."""
    name = given(config.generator.teacher, "--teacher")
    return with_velocity(load_teacher(name), name)


def description(config: TrainConfig, generator: Preconditioned) -> str:
    """What the stage does, in one line; empty for a run without it."""
    if not is_wanted(config, generator):
        return ""
    return f"the teacher, which predicts noise, learns to predict v for {_images(config):,} images"


def _images(config: TrainConfig) -> int:
    return round(config.generator.velocity_kimg * 1e3)


def settings(config: TrainConfig, generator: Preconditioned) -> PretrainConfig:
    """The settings for `gdd_fast.pretrain`; its run folder is inside the distillation's."""
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


def run(config: TrainConfig, parts: Components, world: World) -> tuple[loop.Outcome, Preconditioned, float]:
    """Start, resume or skip the stage, if finished: returns how it ended, its network, and the seconds it took. Reads
    the data set of `parts` and does not change them.

    Raises what `loop.run` raises.
    """
    asked = _as_finished(settings(config, parts.generator))
    if world.is_main:
        print(f"First, in {asked.run_dir}: {description(config, parts.generator)}.")
    began = time.monotonic()
    task = Pretraining(asked, world, parts.dataset)
    task.remedy = "--g-precision fp32, or with --velocity-kimg 0, which leaves this stage out,"
    schedule, defaults, log = loop.Schedule.of(asked), default_settings(asked), loggers(config.run.log)
    outcome = loop.run(task, asked.run_dir, to_dict(asked), schedule, world, defaults, log)
    world.barrier()  # the main process may have rewritten the network
    start = parts.generator if outcome.exit_status else load_generator(asked.run_dir / TEACHER)
    return outcome, start, time.monotonic() - began


def _as_finished(asked: PretrainConfig) -> PretrainConfig:
    """`asked`, with the batch and precision of a finished stage, as a distillation may resume with others.

    Raises CheckpointError for a stage of another length, on which learning rates and average depend.
    """
    stored = loop.stored_values(asked.run_dir)
    if stored is None:
        return asked
    length = stored["config"].get("duration_mimg")
    if isinstance(length, float) and length != asked.duration_mimg:
        raise CheckpointError(
            f"{asked.run_dir} was started with --velocity-kimg {1e3 * length:g}, not {1e3 * asked.duration_mimg:g}: "
            "give that again, choose another --run-dir or move the folder away"
        )
    if stored["images"] < round(asked.duration_mimg * 1e6):
        return asked
    kept = {name: stored["config"].get(name) for name in ("batch", "precision")}
    return replace(asked, **kept, batch_gpu=None)


def remaining(schedule: loop.Schedule, seconds: float) -> loop.Schedule:
    """`schedule` for a run that has already used this many seconds."""
    return replace(schedule, seconds=max(0.0, schedule.seconds - seconds))
