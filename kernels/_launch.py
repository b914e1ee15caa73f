"""What the launchers share: launch configurations from tuned.json, and how many programs fill a device."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

# Programs that Triton's interpreter is given as a full chip: few, so that small tests meet both sides of every rule.
_INTERPRETED_PROGRAMS = 8


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "tuned.json").read_text())


@functools.lru_cache(maxsize=4096)
def configuration(operator: str, device: torch.device, shape: tuple[int, ...] = ()) -> dict[str, int]:
    """Launch options of `operator` on `device`.

    Those of the operator ("default"), overridden by those of the device's architecture ("sm_90"), overridden by the
    entry of the architecture's "measured" list whose "shape" is nearest to `shape` in ratio, if it has such a list.
    """
    entries = _table()[operator]
    options = dict(entries["default"])
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        options |= entries.get(f"sm_{major}{minor}", {})
    measured = options.pop("measured", ())
    if measured and shape:
        options |= min(measured, key=lambda entry: _distance(entry["shape"], shape))["options"]
    return options


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """As many programs as keep every multiprocessor of `device` busy: two each."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def pixel_stride(x: torch.Tensor) -> int:
    """The step from one pixel of (N, C, H, W) to the next, where rows are evenly spaced."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)
