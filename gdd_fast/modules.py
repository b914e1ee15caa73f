"""The layers EDM's networks are built from, in plain torch.

Each thing a U-Net block does to its activations is one call here: normalise and activate (`GroupNorm`), convolve and
resample (`Conv2d`, `resample`), merge a residual (`merge`), attend (`attention`), concatenate a skip (`concat`). A
fused operator replaces the body of one of them and nothing else.

Parameters are float32 and stay so; a layer computes in the dtype of the activations it is given. Parameter and buffer
names equal EDM's (Karras et al., arXiv 2206.00364), so that its weights load unchanged.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError
from gdd_fast.ops.resample2d import resample2d


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer's weight and bias are drawn: a distribution over the fans, and a gain for each of the two."""

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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def resample_kernel(taps: Sequence[float]) -> Tensor:
    """The normalised 2-d filter, float32 (1, 1, K, K), of a symmetric 1-d one with an even number of taps."""
    if len(taps) < 2 or len(taps) % 2 or sum(taps) <= 0:
        raise ConfigError(f"resample_filter must have an even number of taps and a positive sum, got {list(taps)}.")
    row = torch.tensor([float(tap) for tap in taps])
    return (torch.outer(row, row) / row.sum().square())[None, None]


def resample(
    x: Tensor, kernel: Tensor, *, up: bool, padding: int, box: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Filter each channel with `kernel` (1, 1, K, K) and double (`up`) or halve the resolution of `x` (N, C, H, W).

    The resolution is exactly doubled or halved with `padding` = K / 2 - 1, in pixels of the larger image's border.
    `box` promises that the kernel is the 2x2 mean: plain PyTorch then repeats or averages pixels without a convolution.
    """
    return resample2d(x, kernel, up=up, padding=padding, box=box, backend=backend)


class Conv2d(nn.Module):
    """Convolution (odd `kernel`, same size) after an optional up- or downsampling by two; `kernel=0` only resamples.

    `conv_first` convolves at the full resolution and downsamples after it, over one common border of zeros. EDM calls
    this fused_resample and uses it in the residual encoder of NCSN++.

    `backend` is that of the resampling; see gdd_fast.backend.
    """

    backend: Backend = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        conv_first: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if (up and down) or (conv_first and not (down and kernel)):
            raise ConfigError("a convolution goes up or down, not both, and conv_first needs a kernel and down=True.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.conv_first = conv_first
        self.padding = kernel // 2
        self.border = len(resample_filter) // 2 - 1
        self.taps = tuple(resample_filter)
        self.box = len(self.taps) == 2 and self.taps[0] == self.taps[1]
        if kernel:
            init = init or Init()
            fans = (in_channels * kernel * kernel, out_channels * kernel * kernel)
            self.weight = nn.Parameter(init.draw((out_channels, in_channels, kernel, kernel), init.weight, *fans))
            self.bias = nn.Parameter(init.draw((out_channels,), init.bias, *fans))
        else:
            self.weight = self.bias = None
        self.register_buffer("resample_filter", resample_kernel(self.taps) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv_first:
            # The border that the filter needs is added once, before the convolution.
            x = self._convolve(x, self.padding + self.border)
            return resample(x, self.resample_filter, up=False, padding=0, box=self.box, backend=self.backend)
        if self.up or self.down:
            options = {"up": self.up, "padding": self.border, "box": self.box, "backend": self.backend}
            x = resample(x, self.resample_filter, **options)
        return x if self.weight is None else self._convolve(x, self.padding)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation and what surrounds it in a U-Net block, as one call computed in float32.

    y = act(norm(x + add) * weight + bias), or act((norm(x + add) * weight + bias) * (1 + scale) + shift).
    """

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

    def forward(
        self,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: Literal["silu"] | None = "silu",
    ) -> Tensor:
        """`x` (N, C, H, W) in any floating dtype -> the same. `add`, or `scale` with `shift`: (N, C) or (1, C)."""
        y = x.float()
        if add is not None:
            y = y + add.float()[:, :, None, None]
        y = F.group_norm(y, self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        if scale is not None:
            y = torch.addcmul(shift.float()[:, :, None, None], y, scale.float()[:, :, None, None] + 1)
        if activation == "silu":
            y = F.silu(y)
        return y.to(x.dtype)


def merge(x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
    """`(x + residual) * scale`: the end of every residual branch."""
    y = x + residual
    return y if scale == 1 else y * scale


def concat(x: Tensor, skip: Tensor) -> Tensor:
    """A decoder block's input: the activations and the encoder's skip, side by side in the channels."""
    return torch.cat([x, skip], dim=1)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention over the pixels: packed (N, 3C, H, W) -> (N, C, H, W), in the memory format of `qkv`.

    Channel `(head * C / num_heads + c) * 3 + j` of `qkv` holds channel c of the head's query (j = 0), key (1) or
    value (2), as in EDM. Logits are scaled by 1 / sqrt(C / num_heads); softmax is in float32 in every dtype.
    """
    n, packed, h, w = qkv.shape
    channels_last = qkv.is_contiguous(memory_format=torch.channels_last) and not qkv.is_contiguous()
    # One copy brings the tokens of q, k and v to (3, N, heads, H * W, C / heads), the form the attention kernels read.
    tokens = qkv.reshape(n, num_heads, packed // (3 * num_heads), 3, h * w).permute(3, 0, 1, 4, 2).contiguous()
    y = F.scaled_dot_product_attention(*tokens.unbind(0))
    if channels_last:
        return y.transpose(1, 2).reshape(n, h, w, packed // 3).permute(0, 3, 1, 2)
    return y.transpose(2, 3).reshape(n, packed // 3, h, w).contiguous()


class PositionalEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced frequencies 1 ... 1/10000: (N,) -> (N, num_channels)."""

    def __init__(self, num_channels: int, *, endpoint: bool = False, sin_first: bool = False) -> None:
        super().__init__()
        self.half = num_channels // 2
        self.endpoint = endpoint
        self.sin_first = sin_first

    def forward(self, x: Tensor) -> Tensor:
        exponents = torch.arange(self.half, dtype=torch.float32, device=x.device) / (self.half - int(self.endpoint))
        return _waves(torch.outer(x, (1e-4**exponents).to(x.dtype)), self.sin_first)


class FourierEmbedding(nn.Module):
    """Sines and cosines of random frequencies, drawn once from N(0, 16^2): (N,) -> (N, num_channels)."""

    def __init__(self, num_channels: int, *, sin_first: bool = False) -> None:
        super().__init__()
        self.sin_first = sin_first
        self.register_buffer("freqs", torch.randn(num_channels // 2) * 16)

    def forward(self, x: Tensor) -> Tensor:
        return _waves(torch.outer(x, (math.tau * self.freqs).to(x.dtype)), self.sin_first)


def _waves(phase: Tensor, sin_first: bool) -> Tensor:
    waves = (phase.sin(), phase.cos()) if sin_first else (phase.cos(), phase.sin())
    return torch.cat(waves, dim=1)
