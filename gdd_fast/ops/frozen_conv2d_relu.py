"""A frozen convolution followed by ReLU or ReLU6: one bit per element is kept for backward.

PyTorch saves the convolution's input and the activation's output. Here neither is needed: besides the weight, the bits
of `relu_bits` say where the activation is flat.

Everything after the forward pass is linear, so the operator can be differentiated any number of times.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser, extension
from gdd_fast.errors import ConfigError
from gdd_fast.ops._memory_format import autocast_dtype, memory_format, runs_eagerly
from gdd_fast.ops._planned import plans, wanted
from gdd_fast.ops.frozen_conv2d import (
    Geometry,
    Size2,
    convolve,
    frozen_conv2d,
    geometry,
    input_gradient,
    prepare,
)
from gdd_fast.ops.relu_bits import CEILING, Activation, masked, plan_bits

OPERATOR = Operator("frozen_conv2d_relu", fused=frozenset({"triton", "cpp"}))
_choose = chooser(OPERATOR)


def frozen_conv2d_relu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    activation: Activation = "relu",
) -> Tensor:
    """The definition; arguments as for `frozen_conv2d_relu`. PyTorch keeps the result for backward."""
    y = frozen_conv2d(x, weight, bias, stride, padding, dilation, groups, backend="torch")
    return F.relu(y) if activation == "relu" else F.relu6(y)


def frozen_conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    activation: Activation = "relu",
    backend: Backend = "auto",
) -> Tensor:
    """`relu(conv2d(x))` for a weight without gradient; differentiable in x and bias.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as for `frozen_conv2d`; fold a frozen batch norm into weight
        and bias first.
        activation: "relu" or "relu6", the clamp to [0, 6].
        backend: "auto", "torch", "triton" or "cpp": what packs the bits; "cpp" also does autograd's part. The
        convolution is as in `frozen_conv2d`; with "auto" and without gradients it is cuDNN's with bias and ReLU, of
        shapes for which kernels/tuned.json says that this is faster on the GPU at hand.

    Returns:
        (N, K, H', W') in the compute dtype.

    Raises:
        InputError: as `frozen_conv2d`.
        ConfigError: an activation of another name.
        BackendError: the requested backend cannot run here.
    """
    if activation not in CEILING:
        raise ConfigError(f"frozen_conv2d_relu: activation must be one of {', '.join(CEILING)}, not {activation!r}")
    implementation = _choose(backend, x.device.type)
    if x.is_cuda and backend == "auto" and activation == "relu" and not torch.compiler.is_compiling():
        measured = _faster_by_cudnn(x.device)
        y = _by_cudnn(x, weight, bias, geometry(stride, padding, dilation, groups), measured) if measured else None
        if y is not None:
            return y
    planned = None
    if implementation == "triton" and wanted(x, backend):
        planned = plans(plan_bits)
    elif implementation == "cpp" and runs_eagerly(x):
        planned = extension(), None
    if planned is not None:
        module, cache = planned
        y = module.planned_frozen_conv2d_relu(
            cache, x, weight, bias, stride, padding, dilation, groups, CEILING[activation]
        )
        if y is not None:  # else something is to be refused
            return y
    if implementation == "torch":
        return frozen_conv2d_relu_ref(x, weight, bias, stride, padding, dilation, groups, activation)
    x, weight, bias = prepare(x, weight, bias, "frozen_conv2d_relu")
    g, ceiling = geometry(stride, padding, dilation, groups), CEILING[activation]
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        if implementation == "triton" and not torch.compiler.is_compiling():  # a compiler fuses bias and clamp itself
            y = _dense(convolve(x, weight, None, g))
            torch.ops.gdd_fast.clamp_(y, ceiling, bias)
            return y
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return F.relu_(y) if activation == "relu" else F.relu6(y, inplace=True)
    return _ConvolutionRelu.apply(x, weight, bias, g, ceiling, implementation)


@functools.cache
def _faster_by_cudnn(device: torch.device) -> list[list]:
    """The shapes that `_by_cudnn` takes on a GPU."""
    from gdd_fast.kernels._launch import faster_by_cudnn

    return faster_by_cudnn(device)


def _by_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, measured: Sequence[list]) -> Tensor | None:
    """The result by cuDNN's one operation, which has no gradient, if it was measured to be faster; else None.

    Not where deterministic algorithms were asked for: PyTorch does not tell cuDNN.
    """
    if x.dim() != 4 or weight.dim() != 4 or torch.are_deterministic_algorithms_enabled():
        return None
    given = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    if any(t.device != x.device or t.dtype != autocast_dtype(x) for t in given):
        return None
    (k, c, *window), (*_, side), (stride, padding, dilation, groups) = weight.shape, x.shape, g
    usual = (x.shape[1], window, [*stride], [*padding], [*dilation], groups)
    if usual != (c, window[:1] * 2, [stride[0]] * 2, [window[0] // 2] * 2, [1, 1], 1) or x.shape[2] != side:
        return None
    if [c, k, window[0], stride[0], side, str(x.dtype).removeprefix("torch.")] not in measured:
        return None
    return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)


class _ConvolutionRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, ceiling: float, implementation: str
    ) -> Tensor:
        # Triton's kernel adds the bias on the way; a GPU's convolution would take a separate pass
        late = bias if implementation == "triton" else None
        y = _dense(convolve(x, weight, None if late is not None else bias, g))
        ctx.out_format = memory_format(y)
        bits = torch.ops.gdd_fast.relu_bits_(y, ceiling, implementation, late)
        ctx.save_for_backward(weight, bits)
        ctx.shape, ctx.format, ctx.geometry, ctx.implementation = x.shape, memory_format(x), g, implementation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, bits = ctx.saved_tensors
        dy = masked(dy, bits, ctx.out_format, ctx.implementation)
        dx = input_gradient(dy, weight, ctx.shape, ctx.format, ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None


def _dense(y: Tensor) -> Tensor:
    """y, dense in its memory format; not always through `contiguous`: if that returns y itself, torch 2.11 compiles
    later in-place changes to a wrong gradient."""
    layout = memory_format(y)
    return y if y.is_contiguous(memory_format=layout) else y.contiguous(memory_format=layout)
