"""What a run shows while it goes on: a progress bar, metrics.jsonl, TensorBoard where it is installed."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gdd_fast.files import atomic_write


class Averages:
    """Means of named scalars between two ticks, kept on the device so that adding one never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means so far; starts anew."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class RunOutput:
    """Progress of one run, written by the main rank only.

    Args:
        run_dir: folder of metrics.jsonl and of TensorBoard's event files.
        total: images at which the run ends.
        start: images already seen; metric lines beyond it, from work that a crash lost, are dropped.
        unit: what the progress bar counts.
        enabled: False on every rank but the main one: all methods do nothing.
    """

    def __init__(self, run_dir: Path, total: int, start: int, *, unit: str = "img", enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar = tqdm(
            total=total, initial=start, unit=unit, unit_scale=True, smoothing=0.05, disable=not enabled, dynamic_ncols=True
        )
        self._started, self._since = time.monotonic(), start
        self._board = None
        if not enabled:
            return
        self._path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._path, start)
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run_dir, purge_step=start)

    def advance(self, images: int) -> None:
        """Move the bar by `images`."""
        self._bar.update(images)

    def metrics(self, images: int, values: dict[str, float]) -> dict[str, float]:
        """Write one line for the state after `images` images; adds the rate since the last call and the memory peak."""
        now = time.monotonic()
        rate = (images - self._since) / max(now - self._started, 1e-9)
        self._started, self._since = now, images
        line = {"images": images, "images_per_second": round(rate, 3), **values}
        if torch.cuda.is_initialized():
            line["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, images)
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.startswith("loss")}, refresh=False)
        return line

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._bar.write(message)

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()


def _drop_lines_after(path: Path, images: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    kept = [line for line in lines if json.loads(line)["images"] <= images]
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
