"""`python -m gdd_fast.train`: distil a diffusion teacher into a one-step generator.

    python -m gdd_fast.train                              # the demo: bundled teacher and data, minutes on a CPU
    python -m gdd_fast.train --preset cifar10-uncond-gdd-i \\
        --data cifar10-32x32.zip --teacher edm-cifar10-32x32-uncond-ve.pkl --run-dir runs/c10
    torchrun --standalone --nproc_per_node=8 -m gdd_fast.train ...

Running the same command again resumes. Flags override the preset's settings.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gdd_fast import config as configs
from gdd_fast.cli import parse, pop_flag, pop_option
from gdd_fast.config import TrainConfig, preset, to_dict
from gdd_fast.errors import command


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    config: TrainConfig
    dry_run: bool


def read(arguments: Sequence[str]) -> Command:
    """The configuration: the preset named by `--preset` (default: demo), overridden by the other flags."""
    name, arguments = pop_option(arguments, "preset", default=configs.DEMO)
    dry_run, arguments = pop_flag(arguments, "dry-run")
    about = f"{__doc__}\nAlso: --preset {{{','.join(configs.PRESETS)}}}, whose settings are the defaults below; --dry-run."
    config = parse(TrainConfig, preset(name), args=arguments, description=about)
    config.validate()
    return Command(config, dry_run)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    asked = read(sys.argv[1:] if arguments is None else arguments)
    config = asked.config
    # imported late: --help needs no torch
    from gdd_fast.distill import distributed, dry_run, loop, parts, precision
    from gdd_fast.distill.distillation import Distillation
    from gdd_fast.distill.report import write_report

    built = parts.build(config)
    if asked.dry_run:
        print(dry_run.describe(config, built))
        return
    world = distributed.join(config.run.device)
    schedule = loop.Schedule(config.total_images, round(config.run.tick_kimg * 1e3), config.run.checkpoint_ticks)
    try:
        with precision.allow_tf32(config):
            task = Distillation(config, built, world)
            finished = loop.run(task, config.run_dir, to_dict(config), schedule, world)
    finally:
        world.leave()
    if not world.is_main:
        return
    if not finished:
        print("Stopped; the same command resumes.")
        return
    if config.run.evaluate_images:
        write_report(config, world.device)
    print(f"One-step generator in {config.run_dir / 'generator_ema'}")


if __name__ == "__main__":
    main()
