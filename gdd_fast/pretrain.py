"""`python -m gdd_fast.pretrain`: train a diffusion teacher from scratch with EDM's denoising loss.

    python -m gdd_fast.pretrain --data cifar10-32x32.zip --run-dir runs/teacher

The averaged network is written to RUN_DIR/teacher, which `gdd_fast.train --teacher` takes. Running the same command
again resumes.
"""

from gdd_fast.cli import parse
from gdd_fast.config import to_dict
from gdd_fast.distill import distributed, loop
from gdd_fast.distill.pretraining import PretrainConfig, Pretraining
from gdd_fast.errors import command


@command
def main() -> None:
    config = parse(PretrainConfig, description=__doc__)
    world = distributed.join(config.device)
    try:
        task = Pretraining(config, world)
        schedule = loop.Schedule(
            round(config.duration_mimg * 1e6), round(config.tick_kimg * 1e3), config.checkpoint_ticks
        )
        finished = loop.run(task, config.run_dir, to_dict(config), schedule, world)
    finally:
        world.leave()
    if world.is_main:
        where = config.run_dir / "teacher"
        print(f"Teacher in {where}" if finished else "Stopped; the same command resumes.")


if __name__ == "__main__":
    main()
