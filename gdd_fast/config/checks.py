"""Checks of configuration values. Each raises a `ConfigError` that names the flag, and reads no file."""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from gdd_fast.errors import ConfigError, require
from gdd_fast.settings import Limit

if TYPE_CHECKING:
    from gdd_fast.config.ablation import AblationConfig
    from gdd_fast.config.sections import (
        DiscriminatorConfig,
        GeneratorConfig,
        RunConfig,
        TrainConfig,
    )

LOGGERS = ("tensorboard", "wandb")
MAX_SEED = 2**63 - 1
MAX_HEAD_WIDTH = 16  # 256 times the paper's weights
MAX_DISC_RESOLUTION = 4096
CLASS_TABLES = ("imagenet", "learned", "per-head")
CLASS_TABLE_FILES = (".pkl", ".safetensors", ".npy")


def check_values(section: Any) -> None:
    """Raise `ConfigError` for a value that is not one of its literals, is below its `Limit`, or is not finite."""
    for f in fields(section):
        value, flag = getattr(section, f.name), f"--{f.name.replace('_', '-')}"
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ConfigError(f"{flag} must be one of {', '.join(get_args(f.type))}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} must be finite, not {value}")
        for limit in getattr(f.type, "__metadata__", ()):
            if isinstance(limit, Limit):
                limit.check(value, flag)


def check_generator(generator: "GeneratorConfig") -> None:
    require(0 <= generator.freeze <= 3, f"--freeze must be 0, 1, 2 or 3, not {generator.freeze}")


def check_discriminator(discriminator: "DiscriminatorConfig") -> None:
    width, resolution = discriminator.head_width, discriminator.disc_resolution
    require(
        0 < width <= MAX_HEAD_WIDTH,
        f"--head-width must be positive and at most {MAX_HEAD_WIDTH}, not {width}",
    )
    require(
        1 <= resolution <= MAX_DISC_RESOLUTION,
        f"--disc-resolution must be from 1 to {MAX_DISC_RESOLUTION}, not {resolution}",
    )
    table = discriminator.class_embedding
    require(
        table in CLASS_TABLES or Path(table).suffix in CLASS_TABLE_FILES,
        f"--class-embedding must be one of {', '.join(CLASS_TABLES)} or the path of a {', '.join(CLASS_TABLE_FILES)} "
        f"file, not {table!r}",
    )
    names = discriminator.backbones
    require(len(names) >= 1, "--backbones needs at least one name")
    require(len(set(names)) == len(names), "--backbones has a name twice")
    for name in named_paths("--backbone-weights", discriminator.backbone_weights):
        require(name in names, f"--backbone-weights names {name!r}, not among --backbones {' '.join(names)}")


def check_run(run: "RunConfig") -> None:
    few = run.batch_gpu not in (None, "auto") and int(run.batch_gpu) < 2
    require(not few, f"--batch-gpu must be at least 2, not {run.batch_gpu}")
    require(round(run.duration_mimg * 1e6) >= 1, f"--duration-mimg must be positive, not {run.duration_mimg}")
    check_seed(run.seed)
    closed = run.engine in ("graph", "compile")
    require(not (run.debug_finite and closed), f"--debug-finite cannot look into --engine {run.engine}; use eager")
    require(not (run.fsdp and closed), f"--engine {run.engine} cannot hold weights that --fsdp shards; use eager")
    require(not run.fsdp or not run.debug_finite, "--debug-finite cannot look into weights that --fsdp shards")
    require(run.evaluate_images != 1, "--evaluate-images 1: a covariance needs at least 2 images")
    require(
        not run.measures or run.evaluate_images > 0,
        "--evaluate-ticks and --evaluate-at-start need images to measure: --evaluate-images 5000, for instance",
    )
    require(run.measures or not run.evaluate_ref, "--evaluate-ref: nothing is measured; see --evaluate-ticks")
    loggers(run.log)
    named_paths("--feature-weights", run.feature_weights)


def check_ablation(options: "AblationConfig") -> None:
    require(
        options.gan == "on" or options.adds_losses, "--gan off leaves no loss: add --teacher-loss or --frechet-loss"
    )
    steps = options.pd_steps
    require(0 <= options.target_ema < 1, f"--target-ema must be at least 0 and below 1, not {options.target_ema}")
    require(steps >= 1 and steps & (steps - 1) == 0, f"--pd-steps must be a power of two, not {steps}")
    require(len(set(options.frechet_loss)) == len(options.frechet_loss), "--frechet-loss names a network twice")


def check_together(config: "TrainConfig") -> None:
    """Raise `ConfigError` for settings of several sections that do not work together."""
    run, ablation = config.run, config.ablation
    require(
        run.measures or ablation.adds_losses or not run.feature_weights,
        "--feature-weights: nothing is measured, and no loss looks through a feature network",
    )
    require(
        run.engine in ("auto", "eager") or not ablation.adds_losses,
        f"--engine {run.engine} does not support the losses of ablations; use eager, or auto",
    )
    require(not run.fsdp or not ablation.adds_losses, "--fsdp is for the paper's loss, without those of ablations")
    steps, kimg = ablation.pd_steps, ablation.pd_stage_kimg
    stages = (steps.bit_length() - 1) * round(kimg * 1e3)
    require(
        ablation.teacher_loss != "pd" or stages < config.total_images,
        f"--duration-mimg {run.duration_mimg} ends before the student has one step: --pd-steps {steps} and "
        f"--pd-stage-kimg {kimg} take {stages:,} images to get there",
    )
    require(
        {config.generator.g_precision, config.discriminator.d_precision} != {"fp32", "tf32"},
        "fp32 and tf32 cannot be mixed: TF32 is one switch for the whole backward pass; "
        "give --g-precision and --d-precision the same one, or use bf16",
    )


def named_paths(flag: str, entries: Sequence[str]) -> dict[str, Path]:
    """`--flag name=path ...` as a mapping; raises `ConfigError` for a malformed entry."""
    for entry in entries:
        require(all(entry.partition("=")[::2]), f"{flag} takes name=path, not {entry!r}")
    return {name: Path(path).expanduser() for name, _, path in (entry.partition("=") for entry in entries)}


def loggers(log: str) -> tuple[str, ...]:
    """The names in `--log`, empty for "none". Raises `ConfigError` for an unknown name."""
    names = tuple(name.strip() for name in log.split(","))
    if names in (("auto",), ("none",)):
        return () if names == ("none",) else names
    for name in names:
        require(name in LOGGERS, f"--log must be auto, none, or some of {', '.join(LOGGERS)}, not {name!r}")
    return names


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that torch's generators do not accept."""
    require(0 <= seed <= MAX_SEED, f"--seed must be from 0 to {MAX_SEED}, not {seed}")
