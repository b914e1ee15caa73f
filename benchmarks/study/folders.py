"""Where a study keeps what it makes; what is there is done."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.plans import Run, Source, Study
from gdd_fast.data.demo import DEMO_SPLITS
from gdd_fast.distill.pretraining import TEACHER
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write


@dataclass(frozen=True)
class Folders:
    """The files of one study below `root`, and the assets that it starts from."""

    study: Study
    root: Path
    assets: Path | None = None

    def data(self, split: str) -> str:
        """What `--data` takes: a prepared set, or the name of a bundled one."""
        source: Source = getattr(self.study, split)
        return source.names[0] if source.names[0] in DEMO_SPLITS else str(self.root / f"{split}.npz")

    def asset(self, names: tuple[str, ...]) -> Path:
        """The first of `names` that is there. Raises ConfigError if none is."""
        if self.assets is None:
            raise ConfigError(f"pass --assets FOLDER with {' or '.join(names)} in it")
        for name in names:
            if (self.assets / name).exists():
                return self.assets / name
        raise ConfigError(f"{self.assets} holds none of {', '.join(names)}")

    @property
    def teacher_run(self) -> Path:
        return self.root / "teacher"

    @property
    def teacher(self) -> str:
        """What `--teacher` and `--net` take."""
        return "demo" if self.study.teacher is None else str(self.teacher_run / TEACHER)

    def run(self, run: Run) -> Path:
        return self.root / "runs" / run.name

    def snapshot(self, run: Run, milestone: int) -> Path:
        """The averaged generator after so many images."""
        return self.root / "snapshots" / run.name / f"{milestone:09d}"

    def reached(self, run: Run) -> list[int]:
        """Milestones of which there is a snapshot."""
        return [m for m in run.milestones if (self.snapshot(run, m) / "config.json").exists()]

    def cost(self, folder: Path) -> Path:
        """One line for each part of a run: what it took."""
        return folder / "cost.jsonl"

    def failure(self, run: Run) -> Path:
        """Why a run cannot go on; removing it lets it try again."""
        return self.run(run) / "failed.txt"

    def judged(self, what: str, images: int, sampler: str, seed_set: int) -> Path:
        return self.root / "judged" / what / f"{images:09d}-{sampler}-{seed_set}.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
