"""What a run shows as it progresses: a progress bar, metrics.jsonl, and viewers such as TensorBoard."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdd_fast.files import atomic_write
from gdd_fast.training import health
from gdd_fast.training.loggers import Logger, open_loggers


class Averages:
    """Means of named scalars between two ticks, kept on the device so that adding one never waits for it.

    They cover this rank's share of the batch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call; resets them."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class RunOutput:
    """Progress of one run, written by the main rank only.

    Args:
        run_dir: folder of metrics.jsonl and of TensorBoard's event files.
        total: images at which the run ends.
        start: images already seen; lines of metrics beyond it, from work that a crash lost, are dropped.
        unit: what the progress bar counts.
        enabled: False on every rank but the main one: nothing is shown or written.
        log, config: where metrics go besides metrics.jsonl, and the settings shown there; see `training.loggers`.
    """

    def __init__(
        self,
        run_dir: Path,
        total: int,
        start: int,
        *,
        unit: str = "img",
        enabled: bool = True,
        log: Sequence[str] = ("auto",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from tqdm import tqdm

        self._enabled = enabled
        self._path = run_dir / "metrics.jsonl"
        self._bar = tqdm(
            total=total,
            initial=start,
            unit=unit,
            unit_scale=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file keeps every state of the bar
            disable=not enabled,
            dynamic_ncols=True,
        )
        self._started, self._since = time.monotonic(), start
        self._seconds = 0.0
        self._lines: list[dict[str, Any]] = []
        self._loggers: list[Logger] = []
        if enabled:
            _drop_lines_after(self._path, start)
            self._lines = _lines(self._path)
            self._seconds = 60 * next((line["minutes"] for line in reversed(self._lines) if "minutes" in line), 0.0)
            self._loggers = open_loggers(log, run_dir, start, config or {}, self.say)

    def advance(self, images: int) -> None:
        """Move the bar by `images`."""
        self._bar.update(images)

    def metrics(self, images: int, values: dict[str, float]) -> dict[str, float | None]:
        """Write one line for the state after `images` images.

        Adds the rate and peak GPU memory since the last call, the process's peak memory so far, and the minutes spent
        on all images, including those before a run was resumed.

        A value that is not finite is written as null, for want of another in JSON. Returns the line.
        """
        now = time.monotonic()
        self._seconds += now - self._started
        rate = (images - self._since) / max(now - self._started, 1e-9)
        self._started, self._since = now, images
        values = {"minutes": round(self._seconds / 60, 4), "images_per_second": round(rate, 3), **values}
        values["peak_host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_initialized():
            values["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        found = health.signs(self._lines, values)
        values |= {name: float(name in found) for name in health.applicable(values)}
        line = {"images": images, **{name: v if math.isfinite(v) else None for name, v in values.items()}}
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            for logger in self._loggers:
                logger.add(values, images)
            shown = {k: f"{v:.3g}" for k, v in values.items() if k.startswith("loss") and k != health.RAN_AWAY}
            self._bar.set_postfix(shown | ({"warning": ", ".join(found)} if found else {}), refresh=False)
            for name, text in found.items():
                if not (self._lines and self._lines[-1].get(name)):  # reported only when it first appears
                    self.say(f"At {images:,} images: {text}.")
        self._lines.append(line)
        return line

    def changes(self, images: int, changes: list[str]) -> None:
        """Print, and write to metrics.jsonl, that settings have changed from `images` images on."""
        self.say(f"Settings that have changed: {'; '.join(changes)}.")
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps({"images": images, "changed": changes}) + "\n")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._bar.write(message)

    def close(self) -> None:
        self._bar.close()
        for logger in self._loggers:
            logger.close()


@contextlib.contextmanager
def reading_bar(enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for reading the data set, to be called with (images done, total); shown after 2 seconds."""
    from tqdm import tqdm

    with tqdm(desc="Reading images", unit="img", delay=2, disable=not enabled, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _drop_lines_after(path: Path, images: int) -> None:
    """Drop lines of lost work, a line that a crash cut short, and anything that is not a line of metrics."""
    if not path.exists():
        return
    lines = _text(path).splitlines(keepends=True)
    kept = [line for line in lines if _images_of(line) <= images]
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The metrics of the ticks so far; empty for a new run."""
    lines = [json.loads(line) for line in _text(path).splitlines()] if path.exists() else []
    return [line for line in lines if "changed" not in line]


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _images_of(line: str) -> float:
    try:
        entry = json.loads(line) if line.endswith("\n") else {}
        if not all(value is None or isinstance(value, int | float | list) for value in entry.values()):
            return math.inf
        # changed settings follow the state of this many images: they are dropped with the work they applied to
        return entry["images"] + (0.5 if "changed" in entry else 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return math.inf
