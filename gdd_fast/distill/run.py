"""A whole distillation run, from its configuration to its report: what `python -m gdd_fast.train` calls."""

import sys
from dataclasses import dataclass
from pathlib import Path

from gdd_fast.config import TrainConfig, default_settings, loggers, to_dict
from gdd_fast.device import gpu_arithmetic, pick_device
from gdd_fast.distill import comparison, components, first_stage, memory_forecast
from gdd_fast.distill.components import Components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.distill.measuring import BEST, Evaluation, build_measurement
from gdd_fast.distill.step_engine import step_engine
from gdd_fast.files import check_writable
from gdd_fast.metrics.shared_judges import shared_judges
from gdd_fast.models.files.load import RUN_GENERATOR
from gdd_fast.ranks import is_main, join, world_size
from gdd_fast.report import report_page
from gdd_fast.report.run_record import SAMPLES
from gdd_fast.training import loop
from gdd_fast.training.compiled_losses import check_compiler
from gdd_fast.training.loggers import check_loggers
from gdd_fast.training.run_lock import only_process
from gdd_fast.training.sharding import check_sharding


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    images: int
    """Real images seen in the whole run."""
    new_images: int
    """How many of these were seen in this call; 0 if the run was already finished."""
    signal: int
    """The signal that stopped it, 0 if none did."""
    exit_status: int
    """The command's exit status: 0 for a finished run; see `loop.Outcome`."""
    is_main: bool
    """Whether this process is the one of its run that writes and prints."""
    generator: Path
    """Folder of the averaged generator, for `gdd_fast.load_generator`."""
    distances: dict[str, dict[str, float]] | None
    """Frechet distances by network and feature; None without `evaluate_images`, if stopped, and off the main rank."""


def preflight(config: TrainConfig) -> Components:
    """Check everything that could stop the run from finishing, and return its parts. Writes nothing.

    Raises:
        GddFastError: bad input.
    """
    config.validate()
    for folder in ("", SAMPLES, RUN_GENERATOR, BEST, first_stage.FOLDER):
        check_writable(config.run_dir / folder)
    step_engine(config, pick_device(config.run.device), world_size())
    built = components.build(config)
    first_stage.check(config, built.generator)
    if config.run.fsdp:
        check_sharding(built.generator, world_size())
    if config.run.evaluate_images:
        comparison.check(config, built.generator)
    if config.run.measures:
        build_measurement(config, built.generator)
    check_loggers(loggers(config.run.log))
    defaults = default_settings(config)
    loop.check_same_run(config.run_dir, to_dict(config), built.contents, config.total_images, defaults)
    return built


def distill(config: TrainConfig) -> Result:
    """Distil the teacher into a one-step generator, resuming from the checkpoint in `config.run_dir` if there is one.

    Under torchrun every process calls this with the same configuration. Until the run is finished, SIGINT and SIGTERM
    end it after the iteration in progress, with the state saved.

    Raises:
        GddFastError: bad input, before anything is written; another process that trains in that folder
            (`CheckpointError`); or gradients that stopped being finite (`DivergedError`).
    """
    config.validate()
    check_writable(config.run_dir)
    with only_process(config.run_dir, is_main()):
        return _distill(config)


def _distill(config: TrainConfig) -> Result:
    built = preflight(config)
    run = config.run
    schedule = loop.Schedule.of(run, at_start=run.evaluate_at_start)
    precisions = config.generator.g_precision, config.discriminator.d_precision
    # locks the first stage's folder against `pretrain` until training ends
    owned = only_process(
        config.run_dir / first_stage.FOLDER, is_main() and first_stage.is_wanted(config, built.generator)
    )
    with owned, join(config.run.device) as world, gpu_arithmetic(*precisions):
        config = memory_forecast.settle(config, built, world.device, world.size)
        finished = world.largest((loop.stored_values(config.run_dir) or {"images": 0})["images"]) >= config.total_images
        if not finished:
            comparison.read_every_image(config, world)
        if first_stage.is_wanted(config, built.generator):
            weights_follow = world.largest(int((config.run_dir / loop.CHECKPOINT).exists()))  # from the checkpoint
            if weights_follow or config.ablation.init == "random":
                start = first_stage.form(config)
            else:
                if run.engine == "compile":
                    check_compiler(world.device)
                first, start, seconds = first_stage.run(config, built, world)
                if first.exit_status:
                    generator = config.run_dir / RUN_GENERATOR
                    return Result(0, 0, first.signal, first.exit_status, world.is_main, generator, None)
                schedule = first_stage.remaining(schedule, seconds)
            built = components.with_generator_from(start, config, built)
        evaluation = None
        if config.run.measures:
            measurement = build_measurement(config, built.generator, world.device)
            evaluation = Evaluation(config, measurement, world)
            if world.is_main:
                for line in shared_judges(config.discriminator.backbones, measurement.extractors):
                    print(line, file=sys.stderr)
        task = Distillation(config, built, world, evaluation)
        if not world.largest(int((config.run_dir / loop.CHECKPOINT).exists())):
            comparison.begin(config, task)
        defaults, log = default_settings(config), loggers(run.log)
        outcome = loop.run(task, config.run_dir, to_dict(config), schedule, world, defaults, log)
    distances = None
    if config.run.evaluate_images and world.is_main and not outcome.exit_status:
        distances = None if outcome.new_images else comparison.read(config, built.contents, outcome.images)
        if distances is None:
            distances = comparison.write(config, built.contents, world.device, outcome.images)
        report_page.refresh(config.run_dir)  # with what was just measured, or by a process killed before this
    generator = config.run_dir / RUN_GENERATOR
    return Result(
        outcome.images, outcome.new_images, outcome.signal, outcome.exit_status, world.is_main, generator, distances
    )
