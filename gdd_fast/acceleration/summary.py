"""What `accelerate` did to a network, module by module."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from gdd_fast.acceleration.class_exchange import covered, give_back
from gdd_fast.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One module: its name in the network, its class, and what was done to it or why nothing was."""

    path: str
    kind: str
    note: str


@dataclass(frozen=True)
class Report:
    """What was replaced and what was left, and why. `print(report)` groups it; the entries name every module.

    `counts` has the numbers of replaced and left modules by class. With `engine="graph"`, `forwards` counts replays
    and, by reason, the calls that ran uncaptured so far.
    """

    backend: str
    device: str
    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    net: nn.Module = field(repr=False, compare=False)
    forwards: Any = field(default=None, repr=False, compare=False)

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """{"replaced": Counter({"Conv2d": 52, ...}), "left": Counter(...)}"""
        return {
            "replaced": Counter(entry.kind for entry in self.replaced),
            "left": Counter(entry.kind for entry in self.left),
        }

    def undo(self) -> nn.Module:
        """Give every module its own forward back, as `restore`; returns the network."""
        return restore(self.net)

    def __str__(self) -> str:
        head = (
            f"gdd_fast.accelerate on {self.device} (backend {self.backend}): "
            f"{len(self.replaced)} modules replaced, {len(self.left)} left"
        )
        graphs = [] if self.forwards is None else [str(self.forwards)]
        return "\n".join([head, *graphs, *_table("replaced", self.replaced), *_table("left", self.left)])


def _table(title: str, entries: tuple[Entry, ...]) -> list[str]:
    if not entries:
        return []
    key = lambda entry: (entry.kind, entry.note)
    lines = [f"{title}:"]
    for (kind, note), group in groupby(sorted(entries, key=key), key):
        paths = [entry.path or "the network itself" for entry in group]
        named = paths[0] if len(paths) == 1 else f"{paths[0]}, ..."
        lines.append(f"  {len(paths):>4} {kind:<20} {note} ({named})")
    return lines


def restore(net: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module of `net` computes with its class's own forward again. Returns `net`.

    Raises InputError, with nothing undone, if a module has since been given another class, as by a parametrisation or
    FSDP2's `fully_shard`: `restore` would lose it.
    """
    for name, module in net.named_modules():
        if covered(module):
            raise InputError(
                f"{name or 'the network'} has become a {type(module).__name__} since it was accelerated: remove its "
                "parametrisation first, or accelerate before fully_shard"
            )
    for module in net.modules():
        give_back(module)
    return net
