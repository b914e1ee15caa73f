"""The record: one row per case and peer, with the machine it was taken on, as JSON."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results"
FORMAT = 1

Times = list[float]
"""20 %, 50 % and 80 % quantiles, in seconds."""


@dataclass(frozen=True)
class Row:
    """What one peer did in one case. A row without times has a `failure` that says why."""

    group: str
    """What is measured: "group_norm_silu forward", "generator", "G step"."""
    case: str
    """On what: shape, type, memory format, or network and batch."""
    peer: str
    rounds: int = 0
    wall: Times | None = None
    host: Times | None = None
    device: Times | None = None
    cpu: Times | None = None
    headline: str = "wall"
    """The time that peers are compared by: "wall", or "device" where there is one."""
    bytes: int | None = None
    flops: int | None = None
    precision: str = "fp32"
    """Which of the machine's matrix rates `flops` are held against."""
    images: int | None = None
    peak_bytes: int | None = None
    failure: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.case, self.peer

    @property
    def times(self) -> Times | None:
        """The quantiles of the headline."""
        return self.device if self.headline == "device" and self.device is not None else self.wall

    @property
    def seconds(self) -> float | None:
        """The median of the headline."""
        return None if self.times is None else self.times[1]

    def copy_fraction(self, rates: dict[str, float]) -> float | None:
        """Bytes per second as a share of the machine's copy bandwidth."""
        return None if not self.bytes or not self.seconds else self.bytes / self.seconds / rates["copy"]

    def matmul_fraction(self, rates: dict[str, float]) -> float | None:
        """FLOP per second as a share of the machine's matrix rate in this precision."""
        rate = rates.get(self.precision)
        return None if not self.flops or not self.seconds or not rate else self.flops / self.seconds / rate


class Results:
    """Rows by key in order of arrival, and the machine. `save` writes the whole file anew, and never half of it."""

    def __init__(self, machine: dict[str, Any], rates: dict[str, float], rows: Iterable[Row] = ()) -> None:
        self.machine, self.rates = machine, rates
        self._rows: dict[tuple[str, str, str], Row] = {}
        self._lines: dict[tuple[str, str, str], str] = {}  # written once per row, as all are saved after each
        self.add(rows)
        self.notes: dict[str, Any] = {}
        """Whatever else a command wants to keep: parts that failed, candidates of the tuning."""

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Take up rows; one of the same key is replaced."""
        for row in rows:
            self._rows[row.key] = row
            self._lines[row.key] = json.dumps(_sparse(row))

    def save(self, path: Path) -> None:
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "rates": {name: _short(rate) for name, rate in self.rates.items()},
            "notes": self.notes,
        }
        rows = ",\n  ".join(self._lines.values())
        head = json.dumps(content, indent=1)[:-2]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def continued(cls, path: Path, machine: dict[str, Any], rates: dict[str, float]) -> "Results":
        """What is at `path` for the same device, to add to; rows of another commit say so in `extra`."""
        results = cls(machine, rates)
        if path.exists():
            old = cls.load(path)
            if old.machine["device"] == machine["device"]:
                mark = {} if old.machine["commit"] == machine["commit"] else {"commit": old.machine["commit"]}
                results.add(replace(row, extra={**mark, **row.extra}) for row in old.rows)
                results.notes = old.notes
        return results

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Raises ValueError for a file of another format."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a results file of format {FORMAT}: take it anew")
        known = {f.name for f in fields(Row)}
        unknown = sorted({key for row in content["rows"] for key in row} - known)
        if unknown:
            raise ValueError(f"{path}: rows have unknown entries {', '.join(unknown)}")
        loaded = cls(content["machine"], content["rates"], (Row(**row) for row in content["rows"]))
        loaded.notes = content["notes"]
        return loaded


def _sparse(row: Row) -> dict[str, Any]:
    """Without the entries that are at their default; times at four digits, which is more than they are good for."""
    defaults = {f.name: f.default for f in fields(Row)} | {"extra": {}}
    entries = {name: value for name, value in asdict(row).items() if value != defaults[name]}
    return {name: [_short(t) for t in v] if isinstance(v, list) else v for name, v in entries.items()}


def format_seconds(seconds: float | None) -> str:
    """Three digits with a unit; "-" for None."""
    if seconds is None:
        return "-"
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    return f"{seconds / scale:.3g} {unit}"


def _short(number: float) -> float:
    return float(f"{number:.4g}")
