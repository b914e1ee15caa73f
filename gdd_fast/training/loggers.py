"""Viewers that a run's metrics go to beside metrics.jsonl: TensorBoard and Weights & Biases."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write

WANDB_ID = "wandb_id.txt"
"""In the run folder: what a resumed run goes on with at Weights & Biases."""
_PROJECT = "gdd_fast"


class Logger(Protocol):
    """Something that shows metrics."""

    def add(self, values: Mapping[str, float], images: int) -> None:
        """The values after `images` images."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir, purge_step=start)

    def add(self, values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, images)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the project `gdd_fast` or that of WANDB_PROJECT; WANDB_MODE=offline keeps it local.

    A resumed run goes on with the same one. Lost work that is done again adds points at steps that are there already,
    which Weights & Biases leaves out.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import os

        import wandb

        path = run_dir / WANDB_ID
        known = path.read_text().strip() if path.is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            id=known,
            resume="allow" if known else None,
        )
        if known is None:
            with atomic_write(path) as temporary:
                temporary.write_text(self._run.id + "\n")

    def add(self, values: Mapping[str, float], images: int) -> None:
        self._run.log(dict(values), step=images)

    def close(self) -> None:
        self._run.finish()


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a viewer that was asked for by name and is not installed."""
    for name in names:
        if name != "auto" and find_spec(name) is None:
            raise ConfigError(f"--log {name} needs {name}, which is not installed: pip install {name}")


def open_loggers(
    names: Sequence[str], run_dir: Path, start: int, config: Mapping[str, Any], say: Callable[[str], None]
) -> list[Logger]:
    """The viewers of `--log`. With "auto", TensorBoard where it is installed and works; if not, a line says so."""
    if "auto" in names:
        if find_spec("tensorboard") is None:
            return []
        try:
            return [TensorBoard(run_dir, start)]
        except Exception as error:  # whatever its dependencies raise; a viewer is no reason not to train
            say(f"TensorBoard is installed but does not import ({error}): no event files are written.")
            return []
    made: list[Logger] = []
    if "tensorboard" in names:
        made.append(TensorBoard(run_dir, start))
    if "wandb" in names:
        made.append(WeightsAndBiases(run_dir, config))
    return made
