"""Convolution with a weight that is not trained: the input is not kept for backward.

PyTorch's own convolution saves its input for the weight's gradient even if that is not wanted. This one saves the
weight and the input's shape. The extension, if built, does autograd's part: in Python that takes 0.1 ms per call,
forward and backward, longer than many small convolutions.

Forward and the input's gradient are bitwise PyTorch's convolution and its backward, except for float32 in channels_last
memory on a CPU (csrc/constant_convolution.cpp decides, by shape):

- 1x1 convolutions of up to 1024 pixels in all are matrix products; oneDNN would reorder the weight in every call.
- 3x3 convolutions go through Winograd's method, as `winograd_conv2d`, whose rounding error is five times a direct
  convolution's. The weight is transformed in every call.

The gradient is itself linear in the output's gradient, and its derivative is the convolution again: the operator can be
differentiated any number of times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, extension
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import autocast_dtype, cast, memory_format, runs_eagerly

OPERATOR = Operator("frozen_conv2d", fused=frozenset())

Size2 = int | tuple[int, int]
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def frozen_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """The definition: PyTorch's convolution, in x's dtype; arguments as for `frozen_conv2d`."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """`F.conv2d` for a weight without gradient; differentiable in x and bias.

    Args:
        x: (N, C, H, W), floating, in any memory format. Its gradient is channels_last if x's channels are innermost.
        weight: (K, C / groups, R, S), not requiring gradients. Cast in every call if its dtype is not the compute
        dtype, x's or autocast's.
        bias: (K,) or None, trainable or not; cast likewise.
        stride, padding, dilation, groups: as for `F.conv2d`; padding as numbers.
        backend: the layer's. "torch" is PyTorch's convolution, with autograd's part in Python; with any other the
        extension, if built, computes as described above.

    Returns:
        (N, K, H', W') in the compute dtype.

    Raises:
        InputError: x or weight is not four-dimensional or floating, or they or the bias are on different devices, or
            the weight requires a gradient, which it would not get.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if backend != "torch" and (x.is_cpu or (x.is_cuda and recorded)) and runs_eagerly(x):
        y = (
            None
            if (module := extension()) is None
            else module.frozen_conv2d(x, weight, bias, stride, padding, dilation, groups)
        )
        if y is not None:  # else something is to be refused
            return y
    x, weight, bias = prepare(x, weight, bias, "frozen_conv2d")
    if not recorded:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # which keeps nothing
    return _Convolution.apply(x, weight, bias, geometry(stride, padding, dilation, groups))


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias in the compute dtype; raises as `frozen_conv2d`."""
    if x.dim() != 4 or weight.dim() != 4:
        raise InputError(
            f"{name}: x must be (N, C, H, W) and weight (K, C / groups, R, S), not {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise InputError(f"{name}: x and weight must be floating, not {x.dtype} and {weight.dtype}")
    device = x.device
    if weight.device != device or (bias is not None and bias.device != device):
        what, tensor = ("weight", weight) if weight.device != device or bias is None else ("bias", bias)
        raise InputError(f"{name}: {what} is on {tensor.device}, x on {device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name}: the weight requires a gradient: freeze it, or use torch.nn.functional.conv2d")
    dtype = autocast_dtype(x)
    return cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)


def geometry(stride: Size2, padding: Size2, dilation: Size2, groups: int) -> Geometry:
    """The numbers that describe a convolution, all as pairs."""
    first, second, third = ((v, v) if isinstance(v, int) else (v[0], v[1]) for v in (stride, padding, dilation))
    return first, second, third, groups


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """The library's convolution."""
    stride, padding, dilation, groups = g
    return torch.ops.aten.convolution.default(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.format, ctx.geometry = x.shape, memory_format(x), g
        return convolve(x, weight, bias, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = input_gradient(dy, weight, ctx.shape, ctx.format, ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def input_gradient(dy: Tensor, weight: Tensor, shape: torch.Size, layout: torch.memory_format, g: Geometry) -> Tensor:
    """The gradient of an input of `shape` and `layout`, differentiable in dy."""
    return _InputGradient.apply(dy, weight, shape, layout, g)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, weight: Tensor, shape: torch.Size, layout: torch.memory_format, g: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = g
        stride, padding, dilation, groups = g
        # The input's values are not read, but its strides choose the algorithm: memory of the real layout, never
        # written, keeps channels_last, where a broadcast scalar would lose it.
        x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)
        needed = (True, False, False)
        return torch.ops.aten.convolution_backward.default(
            dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, needed
        )[0]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _Convolution.apply(ddx, weight, None, ctx.geometry), None, None, None, None


def converted(weight: Tensor, dtype: torch.dtype, layout: torch.memory_format, pad: tuple[int, ...] = ()) -> Tensor:
    """A frozen weight in `dtype`, in channels_last if that is `layout`, with `pad` zeros around it (as in `F.pad`).

    It is `weight` itself if nothing has to be converted; otherwise every call converts it, in one pass. No copy is kept
    between calls, since nothing tells when it is outdated: fused optimizers, writes through `.data` and FSDP change a
    tensor but not its version. If that pass matters, keep the parameter in the dtype and layout of the computation.
    """
    if pad:
        weight = F.pad(weight, pad)
    if layout is torch.channels_last and not weight.is_contiguous(memory_format=layout):
        return weight.to(dtype, memory_format=layout)
    return cast(weight, dtype)
