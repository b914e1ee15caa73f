"""The linear layer of EDM's networks, and the initialisation of layers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Init:
    """How to draw a layer's weight and bias: a distribution scaled by its fans, and a gain for each of the two."""

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"] = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], gain: float, fan_in: int, fan_out: int) -> Tensor:
        """A float32 tensor of `shape`, from torch's default generator on the default device."""
        if gain == 0:
            return torch.zeros(shape)
        if self.mode == "kaiming_normal":
            return torch.randn(shape) * (gain * math.sqrt(1 / fan_in))
        bound = math.sqrt(6 / (fan_in + fan_out)) if self.mode == "xavier_uniform" else math.sqrt(3 / fan_in)
        return (torch.rand(shape) * 2 - 1) * (gain * bound)


class Linear(nn.Module):
    """`x @ weight.T + bias` in the dtype of `x`: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init: Init | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        init = init or Init()
        fans = (in_features, out_features)
        self.weight = nn.Parameter(init.draw((out_features, in_features), init.weight, *fans))
        self.bias = nn.Parameter(init.draw((out_features,), init.bias, *fans)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), as_dtype(self.bias, x.dtype))


def as_dtype(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in `dtype`, if there is one."""
    return None if bias is None else bias.to(dtype)
