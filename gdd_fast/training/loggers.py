"""Viewers that get a run's metrics in addition to metrics.jsonl: TensorBoard and Weights & Biases."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write

WANDB_ID = "wandb_id.txt"
"""File in the run folder: the id with which a resumed run continues at Weights & Biases."""
_PROJECT = "gdd_fast"


class Logger(Protocol):
    """Shows metrics somewhere."""

    def add(self, values: Mapping[str, float], images: int) -> None:
        """Add the values after `images` images."""

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
    """A Weights & Biases run, in the project `gdd_fast` or that of WANDB_PROJECT; WANDB_MODE=offline keeps it local.

    A resumed run continues it. Work that was lost and is redone adds points at steps that already exist, which Weights
    & Biases ignores.
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
    """Raise `ConfigError` for a viewer that was requested by name but is not installed."""
    for name in names:
        if name != "auto" and find_spec(name) is None:
            raise ConfigError(f"--log {name} needs {name}, which is not installed: pip install {name}")


def open_loggers(
    names: Sequence[str], run_dir: Path, start: int, config: Mapping[str, Any], say: Callable[[str], None]
) -> list[Logger]:
    """The viewers of `--log`. With "auto", TensorBoard if it is installed; `say` is told if it does not work."""
    if "auto" in names:
        if find_spec("tensorboard") is None:
            return []
        try:
            return [TensorBoard(run_dir, start)]
        except Exception as error:  # whatever its dependencies raise: training can do without a viewer
            say(f"TensorBoard is installed but does not import ({error}): no event files are written.")
            return []
    made: list[Logger] = []
    if "tensorboard" in names:
        made.append(TensorBoard(run_dir, start))
    if "wandb" in names:
        made.append(WeightsAndBiases(run_dir, config))
    return made
