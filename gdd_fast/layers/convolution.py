"""Convolution with EDM's optional filtered resampling by two."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError
from gdd_fast.layers.linear import Init, as_dtype
from gdd_fast.layers.skip_pair import Pair
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d
from gdd_fast.ops.resample2d import OPERATOR as RESAMPLE2D
from gdd_fast.ops.resample2d import resample2d


def hold_frozen_weights(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the frozen weights of all convolutions in `net` to `dtype`, in place; returns `net`.

    `Conv2d` would cast such a weight in every call if it computes in another dtype. This is for a network that belongs
    to the caller and only samples in `dtype`: results are bitwise the same, but the weights lose their precision.
    """
    for module in net.modules():
        if isinstance(module, Conv2d) and module.weight is not None and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
    return net


def resample_kernel(taps: Sequence[float]) -> Tensor:
    """The normalised 2-d filter, float32 (1, 1, K, K), of a symmetric 1-d one with an even number of taps."""
    if len(taps) < 2 or len(taps) % 2 or sum(taps) <= 0:
        raise ConfigError(f"resample_filter must have an even number of taps and a positive sum, got {list(taps)}.")
    row = torch.tensor([float(tap) for tap in taps])
    return (torch.outer(row, row) / row.sum().square())[None, None]


class Conv2d(nn.Module):
    """Convolution (odd `kernel`, same size) after an optional up- or downsampling by two; `kernel=0` only resamples.

    `conv_first` convolves at the full resolution and then downsamples, with zero padding added only once. EDM calls
    this fused_resample and uses it in NCSN++'s residual encoder.

    `backend` is that of the resampling; see gdd_fast.backend.
    """

    resample_filter: Tensor

    operator = RESAMPLE2D
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
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("resample_filter", resample_kernel(self.taps) if up or down else None)

    def forward(self, x: Tensor | Pair, *, add_bias: bool = True) -> Tensor:
        """`x` (N, in_channels, H, W), or a pair if this is a 1x1 convolution, -> (N, out_channels, H', W').

        Without `add_bias` the bias is left to a later operator.
        """
        bias = self.bias if add_bias else None
        if isinstance(x, tuple):
            return self._convolve_pair(*x, bias)
        if self.conv_first:
            # The padding that the filter needs is added once, before the convolution.
            x = self._convolve(x, self.bias, self.padding + self.border)
            return resample2d(x, self.resample_filter, up=False, padding=0, box=self.box, backend=self.backend)
        if self.up or self.down:
            x = resample2d(x, self.resample_filter, up=self.up, padding=self.border, box=self.box, backend=self.backend)
        return x if self.weight is None else self._convolve(x, bias, self.padding)

    def _convolve(self, x: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        if self.weight.requires_grad:
            return F.conv2d(x, self.weight.to(x.dtype), as_dtype(bias, x.dtype), padding=padding)
        weight = converted(self.weight, autocast_dtype(x), memory_format(x))
        return frozen_conv2d(x, weight, bias, padding=padding, backend=self.backend)

    def _convolve_pair(self, x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
        if self.weight is None or self.padding or self.up or self.down:
            raise ConfigError("only a 1x1 convolution without resampling takes a pair; concatenate it for the others.")
        first, second = self.weight.to(x.dtype).split([x.shape[1], skip.shape[1]], 1)
        bias = as_dtype(bias, x.dtype)
        if (memory_format(x), memory_format(skip)) != (torch.channels_last, torch.channels_last):
            return F.conv2d(x, first, bias) + F.conv2d(skip, second)
        # In channels_last memory both are matrix products, and the second adds to the first without a separate pass.
        n, _, height, width = x.shape
        rows, skip_rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, skip))
        y = torch.addmm(F.linear(rows, first.flatten(1), bias), skip_rows, second.flatten(1).t())
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)
