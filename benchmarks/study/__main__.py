"""`python -m benchmarks.study NAME`: the method on real images, trained and judged as far as the time goes.

    python -m benchmarks.study cifar16 --assets FOLDER --budget-minutes 30      go on for half an hour
    python -m benchmarks.study cifar16 --only gdd-i --part train                one run, judged later
    python -m benchmarks.study cifar16 --table docs/study                       what there is, in tables and pictures

Everything is kept below --root and taken up again by the same command: SIGINT, SIGTERM and a spent budget save the
state. Two processes may work at once on different runs, or one on `--part train` and one on `--part judge`. Weights of
the judges are found as docs/metrics.md says (the environment variable GDD_FAST_WEIGHTS names folders).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import judging, training
from benchmarks.study.folders import Folders
from benchmarks.study.plans import STUDIES
from gdd_fast.cli import command
from gdd_fast.errors import ConfigError
from gdd_fast.signals import StopRequest


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("study", choices=sorted(STUDIES))
    options.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs alone")
    options.add_argument("--part", choices=("train", "judge"), help="by default both, one after the other")
    options.add_argument("--budget-minutes", type=float, metavar="M", help="stop after so long, with the state saved")
    options.add_argument("--root", type=Path, help="where everything is kept; default: runs/study-NAME")
    options.add_argument("--assets", type=Path, help="folder of the archives that the data sets are made from")
    options.add_argument("--table", type=Path, metavar="FOLDER", help="write tables, curves and sheets there, and stop")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> None:
    asked = parser().parse_args(arguments)
    study = STUDIES[asked.study]
    unknown = set(asked.only) - {run.name for run in study.all_runs()}
    if unknown:
        names = ", ".join(run.name for run in study.all_runs())
        raise ConfigError(f"{study.name} has no run {', '.join(sorted(unknown))}; it has {names}")
    folders = Folders(study, asked.root or Path("runs") / f"study-{study.name}", asked.assets)
    if asked.table:
        from benchmarks.study import tables  # matplotlib, which training needs not

        tables.write(folders, asked.table)
        return
    with StopRequest(announce=True) as stop:
        budget = training.Budget(asked.budget_minutes, stop)
        try:
            if asked.part != "judge":
                training.train(folders, asked.only, budget)
            if asked.part != "train":
                judging.judge(folders, asked.only, budget)
        except training.OutOfTime:
            print("Stopped; the same command goes on from here.")
            if stop.signal:
                raise SystemExit(128 + stop.signal) from None
            return
    print("Everything asked for is trained and judged." if not asked.part else f"All of {asked.part} is done.")


if __name__ == "__main__":
    main()
