"""Self-attention over pixels, and the convolution that makes its queries, keys and values."""

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.linear import Init
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.attention import OPERATOR as ATTENTION
from gdd_fast.ops.attention import attention
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d


class QkvConv2d(Conv2d):
    """The 1x1 convolution that makes queries, keys and values: (N, C, H, W) -> (N, 3 C, H, W) in "blocks".

    Weight and bias are in EDM's order, with channel c of head h of q (j = 0), k and v at (h * D + c) * 3 + j. Every
    call reorders them so that `attention` can read the result without a copy: autograd maps gradients back, and
    checkpoints, exports and optimizers see only EDM's order.
    """

    def __init__(self, channels: int, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__(channels, 3 * channels, 1, init=init)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        bias = self._blocks(self.bias)
        if self.weight.requires_grad:
            return F.conv2d(x, self._blocks(self.weight).to(x.dtype), bias.to(x.dtype))
        weight = converted(self.weight, autocast_dtype(x), memory_format(x))
        return frozen_conv2d(x, self._blocks(weight), bias, backend=self.backend)

    def _blocks(self, parameter: Tensor) -> Tensor:
        """(3 C, ...) from (head, channel, qkv) to (qkv, head, channel)."""
        rest = parameter.shape[1:]
        return parameter.unflatten(0, (self.num_heads, -1, 3)).movedim(2, 0).reshape(-1, *rest)


class Attention(nn.Module):
    """Self-attention over the pixels of the output of `QkvConv2d`: (N, 3 C, H, W) in "blocks" -> (N, C, H, W)."""

    operator = ATTENTION
    backend: Backend = "auto"

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = channels // num_heads
        self.num_heads = num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return attention(qkv, self.num_heads, "blocks", self.backend)
