"""The convolution of frozen networks through which gradients pass."""

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d
from gdd_fast.ops.frozen_conv2d_relu import OPERATOR, Activation, frozen_conv2d_relu


class FrozenConv2d(nn.Conv2d):
    """`nn.Conv2d` with a frozen weight: same arguments (zero padding only) and state_dict, no input kept for backward.

    `forward(x, activation)` also applies ReLU or ReLU6, which keeps one bit per element. It computes in x's dtype (or
    autocast's) and layout; a weight in others is converted in every call, so keep it in these. If the weight is made
    trainable after all, PyTorch's convolution runs.
    """

    operator = OPERATOR
    backend: Backend = "auto"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W')."""
        return self._convolve(x, self.padding, activation)  # type: ignore[arg-type]

    def _convolve(
        self, x: Tensor, padding: tuple[int, int], activation: Activation | None, pad: tuple[int, ...] = ()
    ) -> Tensor:
        """With `pad` zeros around the kernel, as in `F.pad`."""
        geometry = (self.stride, padding, self.dilation, self.groups)
        if self.weight.requires_grad:
            y = F.conv2d(x, F.pad(self.weight, pad) if pad else self.weight, self.bias, *geometry)
            return y if activation is None else F.relu(y) if activation == "relu" else F.relu6(y)
        weight = converted(self.weight, autocast_dtype(x), memory_format(x), pad)
        if activation is None:
            return frozen_conv2d(x, weight, self.bias, *geometry, backend=self.backend)  # type: ignore[arg-type]
        return frozen_conv2d_relu(x, weight, self.bias, *geometry, activation=activation, backend=self.backend)  # type: ignore[arg-type]


def conv_norm_relu(conv: FrozenConv2d, norm: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """Convolution, batch norm and activation: one operator if the norm is folded (an `nn.Identity`)."""
    if isinstance(norm, nn.Identity):
        return conv(x, activation)
    x = norm(conv(x))
    return F.relu(x, inplace=True) if activation == "relu" else F.relu6(x, inplace=True)
