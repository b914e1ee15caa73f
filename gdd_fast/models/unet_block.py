"""The residual block of all EDM's U-Nets: the unit on which freezing, fusing and folding work."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Init, Linear
from gdd_fast.layers.self_attention import Attention, QkvConv2d
from gdd_fast.layers.silent import silent
from gdd_fast.layers.skip_pair import Pair, Statistics
from gdd_fast.ops import residual


class UNetBlock(nn.Module):
    """Residual block conditioned on an embedding, which may resample and may end in self-attention.

    The embedding enters before the second norm as an offset, or after it as scale and shift (`adaptive_scale`).
    """

    operator = residual.OPERATOR
    backend: Backend = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        num_heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init,
        init_zero: Init,
        init_attn: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = num_heads
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        sampling: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **sampling, init=init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            project = resample_proj or in_channels != out_channels
            self.skip = Conv2d(in_channels, out_channels, 1 if project else 0, **sampling, init=init)
        if num_heads:
            if out_channels % num_heads:
                raise ConfigError(f"{out_channels} channels do not divide into {num_heads} attention heads.")
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = QkvConv2d(out_channels, num_heads, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)
            self.attend = Attention(out_channels, num_heads)

    def forward(
        self, x: Tensor | Pair, emb: Tensor, *, statistics: Statistics = None, return_statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """`x` (N, in_channels, H, W), `emb` (N or 1, emb_channels) -> (N, out_channels, H', W') in `x`'s dtype.

        A pair (x, skip) stands for its concatenation. `statistics` are those returned with `x`; `return_statistics`
        also returns the result's, for the norm that reads it next, or None if that would not be fused.
        """
        # Fused norms and residuals also add a convolution's bias, which libraries' convolutions add in a separate pass,
        # and the residual's statistics save the next norm a pass.
        fused = self.norm1.is_fused(x) and self._biases_are_free()
        h = self.conv0(self.norm0(x, statistics=statistics), add_bias=not fused)
        if self.adaptive_scale:
            scale, shift = self.affine(emb).chunk(2, dim=1)
            h = self.norm1(h, add=self.conv0.bias[None] if fused else None, scale=scale, shift=shift)
        else:
            offset = self.affine(emb)
            h = self.norm1(h, add=offset + self.conv0.bias if fused else offset)
        h = self.conv1(F.dropout(h, self.dropout, self.training), add_bias=not fused)
        bias: Tensor | None = self.conv1.bias if fused else None
        if self.skip is not None:
            x = self.skip(x, add_bias=not fused)
            if bias is not None and self.skip.bias is not None:
                bias = bias + self.skip.bias
        elif isinstance(x, tuple):
            x = torch.cat(x, 1)
        x, statistics = self._add(h, x, bias, fused and (return_statistics or self.num_heads > 0))  # type: ignore[arg-type]
        if self.num_heads:
            h = self.attend(self.qkv(self.norm2(x, activation=None, statistics=statistics)))
            h = self.proj(h, add_bias=not fused)
            x, statistics = self._add(h, x, self.proj.bias if fused else None, fused and return_statistics)
        return (x, statistics) if return_statistics else x

    def _biases_are_free(self) -> bool:
        """Whether every convolution may leave its bias to the next operator: none has a hook that would notice."""
        convs = (self.conv0, self.conv1, self.skip, self.proj if self.num_heads else None)
        return all(conv is None or silent(conv) for conv in convs)

    def _add(self, h: Tensor, x: Tensor, bias: Tensor | None, statistics: bool) -> tuple[Tensor, Tensor | None]:
        summed: Any = residual.residual(h, x, bias, self.skip_scale, statistics=statistics, backend=self.backend)
        return summed if statistics else (summed, None)
