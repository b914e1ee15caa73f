"""Embeddings of the noise level."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gdd_fast.errors import WeightsError

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object  # base of the mixin below, which precedes the module's own class


class PositionalEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced frequencies 1 ... 1/10000: (N,) -> (N, num_channels)."""

    def __init__(self, num_channels: int, *, endpoint: bool = False, sin_first: bool = False) -> None:
        super().__init__()
        self.num_waves = num_channels // 2
        self.endpoint = endpoint
        self.sin_first = sin_first

    def forward(self, x: Tensor) -> Tensor:
        exponents = torch.arange(self.num_waves, dtype=torch.float32, device=x.device) / (
            self.num_waves - int(self.endpoint)
        )
        return _waves(torch.outer(x, (1e-4**exponents).to(x.dtype)), self.sin_first)


class KeepsFrequencies(_Module):
    """Mixin for a module with a buffer `freqs` that keeps its precision when the module is cast.

    Phases are some hundreds of radians: with frequencies rounded to bfloat16 they would be off by half a turn.
    """

    freqs: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        freqs = self.freqs
        module = super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < freqs.dtype.itemsize:
            self.freqs = freqs.to(self.freqs.device)
        return module


class FourierEmbedding(KeepsFrequencies, nn.Module):
    """Sines and cosines of random frequencies, drawn once from N(0, 16^2): (N,) -> (N, num_channels).

    The frequencies stay float32 whatever the network is cast to; half-precision ones raise WeightsError.
    """

    def __init__(self, num_channels: int, *, sin_first: bool = False) -> None:
        super().__init__()
        self.sin_first = sin_first
        self.register_buffer("freqs", torch.randn(num_channels // 2, dtype=torch.float32) * 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.freqs.dtype in (torch.bfloat16, torch.float16):
            raise WeightsError(
                f"the embedding's frequencies are {self.freqs.dtype}, too coarse for the noise level: load the weights "
                "in float32 and cast the network afterwards, which leaves the frequencies as they are"
            )
        return _waves(torch.outer(x, (math.tau * self.freqs).to(x.dtype)), self.sin_first)


def _waves(phase: Tensor, sin_first: bool) -> Tensor:
    waves = (phase.sin(), phase.cos()) if sin_first else (phase.cos(), phase.sin())
    return torch.cat(waves, dim=1)
