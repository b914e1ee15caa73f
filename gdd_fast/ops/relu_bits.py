"""ReLU and ReLU6 that keep one bit per element for backward, for networks in which nothing else needs the activation.

PyTorch keeps the result: under a trained convolution that is free, as the convolution keeps the same tensor for its
weight's gradient. Under a frozen one nothing else does. The bits are those of `frozen_conv2d_relu`; this operator is
for where the activation cannot be joined with a convolution.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, resolve
from gdd_fast.errors import ConfigError, InputError
from gdd_fast.ops._memory_format import memory_format
from gdd_fast.ops.frozen_conv2d_relu import CEILING, OPERATOR, Activation, masked


def relu_bits_ref(x: Tensor, activation: Activation = "relu", inplace: bool = False) -> Tensor:
    """The definition; PyTorch keeps the result for backward."""
    return F.relu(x, inplace) if activation == "relu" else F.relu6(x, inplace)


def relu_bits(x: Tensor, activation: Activation = "relu", inplace: bool = False, backend: Backend = "auto") -> Tensor:
    """`relu(x)` or `relu6(x)`, differentiable any number of times; NaN stays and passes its gradient on.

    Args:
        x: (N, C, H, W), floating, dense: contiguous or channels_last.
        activation: "relu" or "relu6", the clamp to [0, 6].
        inplace: overwrite x.
        backend: "auto", "torch", "triton" or "cpp": who packs the bits.

    Returns:
        The same shape, dtype and memory format; x itself if `inplace`.

    Raises:
        InputError: x is not floating, four-dimensional and dense (see `dense`).
        ConfigError: an activation of another name.
        BackendError: the backend asked for cannot run here.
    """
    if activation not in CEILING:
        raise ConfigError(f"relu_bits: activation must be one of {', '.join(CEILING)}, not {activation!r}")
    if not dense(x):
        raise InputError(
            f"relu_bits: x must be floating (N, C, H, W), contiguous or channels_last, not {x.dtype} "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    chosen = resolve(backend, OPERATOR, x.device.type)
    if chosen == "torch" or not (torch.is_grad_enabled() and x.requires_grad):
        return relu_bits_ref(x, activation, inplace)
    return _Relu.apply(x, CEILING[activation], inplace, chosen)


def dense(x: Tensor) -> bool:
    """Whether x is a floating map (N, C, H, W) that fills its memory, contiguous or channels_last."""
    return x.dim() == 4 and x.is_floating_point() and x.is_contiguous(memory_format=memory_format(x))


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float, inplace: bool, backend: str) -> Tensor:
        ctx.layout, ctx.backend = memory_format(x), backend
        if inplace:
            ctx.mark_dirty(x)
            y = x
        else:
            y = torch.empty_like(x).copy_(x)
        ctx.save_for_backward(torch.ops.gdd_fast.relu_bits_(y, ceiling, backend))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return masked(dy, ctx.saved_tensors[0], ctx.layout, ctx.backend), None, None, None
