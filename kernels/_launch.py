"""What the launchers share: the launch itself, configurations from tuned.json, and how many programs fill a device.

tuned.json holds for every operator (group_norm_silu: for either direction)

    "default"       options that hold everywhere, by rule: tiles, warps, a limit of registers
    "sm_90", ...    what differs on an architecture; "measured" in it is a list of {"shape": ..., "options": ...},
                    of which the entry nearest to the shape at hand is taken

and for attention also "faster_than_sdpa": by architecture, the [tokens, channels per head, type] at which the kernels
were measured to be faster than PyTorch's. There, and nowhere else, "auto" takes them. frozen_conv2d_relu has no
options, only "faster_by_cudnn": the [channels, results' channels, kernel, stride, side, type] at which, without
gradients, cuDNN's convolution with bias and ReLU was measured to be faster than a convolution and a pass of ours.

It is read once and checked as a whole (_tuned.py). An architecture without an entry uses the defaults, as sm_80 and
sm_90 do until someone measures them.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._tuned import read as read_table

# Programs that count as a full chip in Triton's interpreter: few, so that small tests meet both sides of every rule.
_INTERPRETED_PROGRAMS = 8

TABLE = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments; `options` are arguments by name and Triton's own options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Noted:
    """What would have been launched, and the memory passed between launches."""

    launches: list[Launch] = field(default_factory=list)
    workspaces: list[torch.Tensor] = field(default_factory=list)


_noted: ContextVar[Noted | None] = ContextVar("noted", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, or note that it would be (see `noting`)."""
    noted = _noted.get()
    if noted is None:
        kernel[grid](*arguments, **options)
    else:
        noted.launches.append(Launch(kernel, grid, arguments, options))


def workspace(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Uninitialised float32 memory that one kernel fills and another reads."""
    made = torch.empty(shape, dtype=torch.float32, device=device)
    noted = _noted.get()
    if noted is not None:
        noted.workspaces.append(made)
    return made


@contextlib.contextmanager
def noting() -> Iterator[Noted]:
    """Within the block, `launch` notes launches instead of making them."""
    found = Noted()
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


@functools.cache
def table() -> dict[str, Any]:
    """The contents of tuned.json. Raises TableError if it is damaged."""
    return read_table(TABLE)


def faster_than_sdpa(device: torch.device) -> list[list]:
    """[tokens, channels per head, type] of the attentions measured to be faster than PyTorch's on this GPU."""
    return table()["attention"]["faster_than_sdpa"].get(_architecture(device), [])


def faster_by_cudnn(device: torch.device) -> list[list]:
    """[channels, results' channels, kernel, stride, side, type] of the convolutions with bias and ReLU that one
    operation of cuDNN's was measured to compute faster on this GPU."""
    return table()["frozen_conv2d_relu"]["faster_by_cudnn"].get(_architecture(device), [])


@functools.lru_cache(maxsize=4096)
def configuration(operator: str, device: torch.device, shape: tuple[int, ...] = ()) -> dict[str, int]:
    """Launch options of `operator` on `device`; for anything but a GPU, the defaults."""
    return options_on(_architecture(device) if device.type == "cuda" else "", operator, shape)


def options_on(architecture: str, operator: str, shape: tuple[int, ...] = ()) -> dict[str, int]:
    """Launch options of `operator` on "sm_90", ....

    The operator's ("default"), overridden by the architecture's, and these by the entry of its "measured" list, if any,
    whose "shape" is nearest to `shape` in ratio.
    """
    entries = table()[operator]
    options = entries["default"] | entries.get(architecture, {})
    measured = options.pop("measured", ())
    if measured and shape:
        options |= min(measured, key=lambda entry: _distance(entry["shape"], shape))["options"]
    return options


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def on_its_device(launcher: Callable) -> Callable:
    """Let `launcher` run with its first tensor's GPU as the current one, which is where Triton launches."""

    @functools.wraps(launcher)
    def launched(x: torch.Tensor, *arguments, **keywords):
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(x, *arguments, **keywords)
        with torch.cuda.device(x.device):
            return launcher(x, *arguments, **keywords)

    return launched


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """The number of programs that keeps every multiprocessor of `device` busy: two each."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def pixel_stride(x: torch.Tensor) -> int:
    """The step from one pixel of (N, C, H, W) to the next, whose rows are evenly spaced."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)
