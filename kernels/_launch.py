"""What the launchers share: the measured launch configurations of tuned.json."""

import functools
import json
from pathlib import Path
from typing import Any

import torch


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "tuned.json").read_text())


@functools.cache
def configuration(operator: str, device: torch.device) -> dict[str, int]:
    """Launch options of `operator` on `device`: those of its architecture, else the operator's default."""
    entries = _table()[operator]
    if device.type != "cuda":
        return entries["default"]
    major, minor = torch.cuda.get_device_capability(device)
    return entries.get(f"sm_{major}{minor}", entries["default"])
