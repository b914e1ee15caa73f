"""`python -m gdd_fast.pretrain`: train a diffusion teacher from scratch with EDM's denoising loss.

    python -m gdd_fast.pretrain --data cifar10-32x32.zip --run-dir runs/teacher
    python -m gdd_fast.pretrain --data my-images.zip --teacher my-ddpm --run-dir runs/v    # trains on, to predict v

The averaged network is written to RUN_DIR/teacher; pass that to `gdd_fast.train --teacher`. Running the same command
again resumes. SIGINT or SIGTERM saves the state after the iteration in progress; the exit status is then 128 + the
signal's number. It is 75 when --max-hours is reached.
"""

from collections.abc import Sequence

from gdd_fast.cli import command, parse, start

with start(__name__):
    from gdd_fast.config import default_settings, to_dict
    from gdd_fast.device import gpu_arithmetic
    from gdd_fast.distill.pretraining import TEACHER, PretrainConfig, Pretraining
    from gdd_fast.files import check_writable
    from gdd_fast.ranks import is_main, join
    from gdd_fast.training import loop
    from gdd_fast.training.run_lock import only_process


@command
def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(PretrainConfig, name="pretrain", args=arguments, description=__doc__)
    config.validate()
    check_writable(config.run_dir)
    schedule = loop.Schedule.of(config)
    with only_process(config.run_dir, is_main()), join(config.device) as world, gpu_arithmetic(config.precision):
        outcome = loop.run(
            Pretraining(config, world), config.run_dir, to_dict(config), schedule, world, default_settings(config)
        )
    if outcome.exit_status:
        if world.is_main:
            print(f"Stopped at {outcome.images:,} images; the same command resumes.")
        raise SystemExit(outcome.exit_status)
    if world.is_main:
        print(f"Teacher after {outcome.images:,} images in {config.run_dir / TEACHER}")


if __name__ == "__main__":
    main()
