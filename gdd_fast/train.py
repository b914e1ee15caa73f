"""`python -m gdd_fast.train`: distil a diffusion teacher into a one-step generator.

    python -m gdd_fast.train                              # the demo: bundled teacher and data, minutes on a CPU
    python -m gdd_fast.train --preset cifar10-uncond-gdd-i \\
        --data cifar10-32x32.zip --teacher edm-cifar10-32x32-uncond-ve.pkl --run-dir runs/c10
    python -m gdd_fast.train --precision public ...       # the public code's arithmetic; see docs/precision.md
    torchrun --standalone --nproc_per_node=8 -m gdd_fast.train ...

--preset names the recipe whose settings are the defaults below. --precision fast or public changes the settings that
docs/precision.md lists; on a GPU the default is fast. Flags override both. With a --teacher of your own and no
--preset, the settings follow from its resolution and size, and are printed. The same command again resumes the run, or
shows its report once it is finished. SIGINT or SIGTERM saves the state after the iteration in progress. The exit status
is 0 for a finished run, 128 + the signal's number (130, 143), 75 when --max-hours is reached, or 2 for bad input. When
a process fails, torchrun adds a traceback and exits with 1: the line "error: ..." says why.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from gdd_fast.cli import command, parse, pop_option, start
from gdd_fast.config import (
    AUTO,
    DEMO,
    PRESETS,
    AblationConfig,
    TrainConfig,
    in_precision,
    override,
    preset,
    recipe_for,
    to_dict,
)


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    config: TrainConfig
    dry_run: bool = False
    """Print the resolved settings, what would be trained and what is still needed, then stop."""


def read(arguments: Sequence[str]) -> Command:
    """The recipe named by `--preset`, in the precision of `--precision` if given, overridden by the other flags.

    Without a preset the recipe is the demo's or, given a teacher, the one that fits the teacher. On a GPU a recipe for
    CPUs takes the precision of the other recipes; a run resumes in the precision it was started in. Raises
    `ConfigError`, `CheckpointError`, and whatever reading the teacher raises.
    """
    name, arguments = pop_option(arguments, "preset", default="")
    precision, arguments = pop_option(arguments, "precision", default="")
    teacher, _ = pop_option(arguments, "teacher", default=DEMO)
    velocity, _ = pop_option(arguments, "velocity-kimg", default="")
    recipe = preset(name or DEMO) if name or teacher == DEMO else _recipe_of(teacher, velocity)
    if precision:
        recipe = in_precision(recipe, precision)
    asked = _asked(recipe, arguments)
    if not precision and recipe.is_for_cpus:
        fast = _asked(in_precision(recipe, "fast"), arguments)
        if _is_taken(fast.config, asked.config):
            asked = fast
    if asked.dry_run and asked.config.missing():
        asked.config.validate_settings()
    else:
        asked.config.validate()
    return asked


def _asked(recipe: TrainConfig, arguments: Sequence[str]) -> Command:
    about = f"{__doc__}\nPresets: {', '.join(PRESETS)}."
    return parse(Command, Command(recipe), name="train", args=arguments, description=about)


def _is_taken(fast: TrainConfig, as_is: TrainConfig) -> bool:
    """Whether to use `fast`: if it is what the run folder's checkpoint was made with, else if the device is a GPU."""
    with start(__name__):  # imported late: --help, which has ended by now, needs no torch
        from gdd_fast.device import pick_device
        from gdd_fast.training.loop import stored_values

    on_gpu = pick_device(fast.run.device).type == "cuda"
    stored = stored_values(fast.run_dir)
    if stored is not None:
        of_run, *both = map(_precisions, (stored["config"], to_dict(fast), to_dict(as_is)))
        if of_run in both:
            return of_run == both[0]
    return on_gpu


def _precisions(config: dict[str, Any]) -> list[str | None]:
    sections = (("generator", "g_precision"), ("discriminator", "d_precision"), ("loss", "r1_precision"))
    return [config.get(section, {}).get(name) for section, name in sections]


def _recipe_of(teacher: str, velocity: str) -> TrainConfig:
    """`velocity` is the value of --velocity-kimg, "" if not given: at 0, a network that predicts noise keeps doing
    so."""
    from gdd_fast.distill.components import load_teacher

    net = load_teacher(teacher)
    size = sum(p.numel() for p in net.parameters())
    try:
        left_out = float(velocity) == 0
    except ValueError:  # empty, or something that the parser will refuse
        left_out = False
    kind = {"predicts_noise": net.predicts_noise, "learns_velocity": net.learns_velocity and not left_out}
    recipe = recipe_for(net.img_resolution, size, net.label_dim, **kind)
    run_dir = Path("runs") / Path(teacher).stem
    return override(recipe, run_dir=run_dir)


# Settings that do not follow from the teacher.
_GIVEN = ("data", "teacher", "run_dir", "seed", "device", "backend", "workers")


def settings_of(config: TrainConfig) -> str:
    """The settings of a run without a preset, as the flags that would set them."""
    shown = [
        (name, value)
        for section in fields(config)
        if is_dataclass(part := getattr(config, section.name)) and part != AblationConfig()
        for name, value in to_dict(part).items()
        if name not in _GIVEN and value not in (None, [])
    ]
    words = [
        f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        + ("" if isinstance(value, bool) else f" {' '.join(map(str, value)) if isinstance(value, list) else value}")
        for name, value in shown
    ]
    return "Settings that follow from the teacher's resolution and size; a flag overrides each:\n  " + " ".join(words)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    asked = read(sys.argv[1:] if arguments is None else arguments)
    config = asked.config
    with start(__name__):  # imported late: --help needs no torch
        from gdd_fast.distill import comparison, dry_run
        from gdd_fast.distill.run import distill, preflight
        from gdd_fast.ranks import is_main

    if asked.dry_run:
        shown = dry_run.describe_recipe(config) if config.missing() else dry_run.describe(config, preflight(config))
        if is_main():
            print(shown)
        return
    if config.preset == AUTO and is_main():
        print(settings_of(config), flush=True)
    result = distill(config)
    if result.exit_status:
        if result.is_main:
            print(f"Stopped at {result.images:,} images; the same command resumes.")
        raise SystemExit(result.exit_status)
    if not result.is_main:
        return
    if not result.new_images:
        print(f"{config.run_dir} is finished: {result.images:,} images. A larger --duration-mimg continues it.")
    if result.distances:
        print(comparison.table(config.run_dir))
    print(f"One-step generator in {result.generator}")


if __name__ == "__main__":
    main()
