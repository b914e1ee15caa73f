"""Group normalisation with the operations around it in a U-Net block."""

from typing import Literal

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError
from gdd_fast.layers.skip_pair import Pair, Statistics
from gdd_fast.ops import group_norm_silu


class GroupNorm(nn.Module):
    """`group_norm_silu` with its parameters: group normalisation and the operations around it in a U-Net block.

    y = act(norm(x + add) * weight + bias), or act((norm(x + add) * weight + bias) * (1 + scale) + shift).
    """

    operator = group_norm_silu.OPERATOR
    backend: Backend = "auto"

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = min(32, num_channels // 4)
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ConfigError(
                f"{num_channels} channels cannot be normalised in {self.num_groups} groups: choose model_channels "
                "as a multiple of 32 (or of 4, below 128 channels)."
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def is_fused(self, x: Tensor | Pair) -> bool:
        """Whether a GPU kernel normalises maps like x: then an addend before the norm takes no extra pass, and
        statistics that come with x save one. On a CPU the convolution adds its bias for free."""
        return group_norm_silu.chosen(x[0] if isinstance(x, tuple) else x, self.backend) == "triton"

    def forward(
        self,
        x: Tensor | Pair,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: Literal["silu"] | None = "silu",
        statistics: Statistics = None,
    ) -> Tensor:
        """`x` (N, C, H, W) in any floating dtype, or a pair -> the same. `add`, `scale`, `shift`: (N, C) or (1, C).

        `statistics` are those that `residual` returned with `x`, if any; for a pair, a pair of them.
        """
        return group_norm_silu.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=activation,
            statistics=statistics,
            backend=self.backend,
        )
