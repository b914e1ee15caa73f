"""Floating-point operations of convolutions and matrix products, counted on the meta device: nothing is computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Any]) -> int:
    """FLOP of `run()`, two for a multiply-add, backward passes included; `run` works on meta tensors."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def meta(t: torch.Tensor) -> torch.Tensor:
    """A meta tensor like `t`."""
    return torch.empty_like(t, device="meta")
