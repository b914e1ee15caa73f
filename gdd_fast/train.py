"""`python -m gdd_fast.train`: distil a diffusion teacher into a one-step generator.

    python -m gdd_fast.train                              # the demo: bundled teacher and data, minutes on a CPU
    python -m gdd_fast.train --preset cifar10-uncond-gdd-i \\
        --data cifar10-32x32.zip --teacher edm-cifar10-32x32-uncond-ve.pkl --run-dir runs/c10
    torchrun --standalone --nproc_per_node=8 -m gdd_fast.train ...

--preset names the recipe whose settings are the defaults below; flags override them. Running the same command again
resumes, and shows the report again once the run is finished. SIGINT or SIGTERM saves the state after the iteration in
progress; the exit status is then 128 + the signal's number (130, 143), 75 when --max-hours are over, 2 for bad input,
0 for a finished run. After a process that failed, torchrun prints a traceback of its own and exits with 1: the line
that begins "error:" says why.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gdd_fast.cli import command, parse, pop_option
from gdd_fast.config import DEMO, PRESETS, TrainConfig, preset


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    config: TrainConfig
    dry_run: bool = False
    """Print the resolved settings, what would train and what is still needed, and stop."""


def read(arguments: Sequence[str]) -> Command:
    """The preset named by `--preset` (default: demo), overridden by the other flags. Raises `ConfigError`."""
    name, arguments = pop_option(arguments, "preset", default=DEMO)
    about = f"{__doc__}\nPresets: {', '.join(PRESETS)}."
    asked = parse(Command, Command(preset(name)), name="train", args=arguments, description=about)
    if asked.dry_run and asked.config.missing():
        asked.config.validate_settings()
    else:
        asked.config.validate()
    return asked


@command
def main(arguments: Sequence[str] | None = None) -> None:
    asked = read(sys.argv[1:] if arguments is None else arguments)
    config = asked.config
    # imported late: --help needs no torch
    from gdd_fast.distill import comparison, dry_run
    from gdd_fast.distill.run import distill, preflight
    from gdd_fast.training.ranks import is_main

    if asked.dry_run:
        shown = dry_run.describe_recipe(config) if config.missing() else dry_run.describe(config, preflight(config))
        if is_main():
            print(shown)
        return
    result = distill(config)
    if result.exit_status:
        if result.is_main:
            print(f"Stopped at {result.images:,} images; the same command resumes.")
        raise SystemExit(result.exit_status)
    if not result.is_main:
        return
    if not result.new_images:
        print(f"{config.run_dir} is finished: {result.images:,} images. A longer --duration-mimg goes on from there.")
    if result.distances:
        print(comparison.table(config.run_dir))
    print(f"One-step generator in {result.generator}")


if __name__ == "__main__":
    main()
