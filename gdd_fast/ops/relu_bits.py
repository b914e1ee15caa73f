"""ReLU and ReLU6 that keep one bit per element for backward, for networks where nothing else needs the activation.

PyTorch keeps the result: before a trained convolution that is free, as the convolution keeps the same tensor for its
weight's gradient. Before a frozen one nothing else does; `frozen_conv2d_relu` fuses convolution and activation.

Bit i of byte j belongs to element 8 j + i of the output in its own memory order (contiguous or channels_last), and is 1
where the gradient is zero: y <= 0, and y >= 6 for ReLU6, so NaN stays and passes its gradient on. Everything after the
forward pass is linear, so the operator can be differentiated any number of times.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.backend import extension as _extension
from gdd_fast.errors import ConfigError, InputError
from gdd_fast.ops._memory_format import memory_format, runs_eagerly
from gdd_fast.ops._planned import plans, wanted

OPERATOR = Operator("relu_bits", fused=frozenset({"triton", "cpp"}))
_choose = chooser(OPERATOR)

Activation = Literal["relu", "relu6"]
CEILING: dict[str, float] = {"relu": math.inf, "relu6": 6.0}


def relu_bits_ref(x: Tensor, activation: Activation = "relu", inplace: bool = False) -> Tensor:
    """The definition; PyTorch keeps the result for backward."""
    return F.relu(x, inplace) if activation == "relu" else F.relu6(x, inplace)


def relu_bits(x: Tensor, activation: Activation = "relu", inplace: bool = False, backend: Backend = "auto") -> Tensor:
    """`relu(x)` or `relu6(x)`, differentiable any number of times; NaN stays and passes its gradient on.

    Args:
        x: (N, C, H, W), floating, dense: contiguous or channels_last.
        activation: "relu" or "relu6", the clamp to [0, 6].
        inplace: overwrite x.
        backend: "auto", "torch", "triton" or "cpp": what packs the bits.

    Returns:
        The same shape, dtype and memory format; x itself if `inplace`.

    Raises:
        InputError: x is not floating, four-dimensional and dense (see `dense`).
        ConfigError: an activation of another name.
        BackendError: the requested backend cannot run here.
    """
    if activation not in CEILING:
        raise ConfigError(f"relu_bits: activation must be one of {', '.join(CEILING)}, not {activation!r}")
    if not dense(x):
        raise InputError(
            f"relu_bits: x must be floating (N, C, H, W), contiguous or channels_last, not {x.dtype} "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    implementation = _choose(backend, x.device.type)
    if implementation == "torch" or not (torch.is_grad_enabled() and x.requires_grad):
        return relu_bits_ref(x, activation, inplace)
    if implementation == "cpp" and runs_eagerly(x):
        y = _extension().planned_relu_bits(None, x, CEILING[activation], inplace)  # type: ignore[union-attr]
        if y is not None:
            return y
    if implementation == "triton" and wanted(x, backend) and (planned := plans(plan_bits)) is not None:
        extension, cache = planned
        y = extension.planned_relu_bits(cache, x, CEILING[activation], inplace)
        if y is not None:
            return y
    return _Relu.apply(x, CEILING[activation], inplace, implementation)


def plan_bits(direction: str, backend: Backend, tensors: Sequence[Any], numbers: tuple[float, ...]) -> tuple | None:
    """The launch plan of the Triton kernels (see gdd_fast.ops._planned): forward of (y, its bias or None) with the
    numbers (ceiling, whether bits are kept), backward of (dy, bits)."""
    from gdd_fast.kernels import relu_bits as kernels
    from gdd_fast.kernels._plans import plan

    if _choose(backend, tensors[0].device.type) != "triton":
        return None
    if direction == "backward":
        return plan(lambda: [kernels.mask_bits(*tensors)], tensors)
    (y, bias), (ceiling, kept) = tensors, numbers
    clamp = kernels.relu_bits_ if kept else kernels.clamp_
    return plan(lambda: [clamp(y, ceiling, bias)], tensors)


def dense(x: Tensor) -> bool:
    """Whether x is a floating map (N, C, H, W) that fills its memory, contiguous or channels_last."""
    return x.dim() == 4 and x.is_floating_point() and x.is_contiguous(memory_format=memory_format(x))


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float, inplace: bool, implementation: str) -> Tensor:
        ctx.layout, ctx.implementation = memory_format(x), implementation
        if inplace:
            ctx.mark_dirty(x)
            y = x
        else:
            y = x.clone()  # torch 2.11 compiles empty_like().copy_() into another gradient
        ctx.save_for_backward(torch.ops.gdd_fast.relu_bits_(y, ceiling, implementation))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return masked(dy, ctx.saved_tensors[0], ctx.layout, ctx.implementation), None, None, None


def masked(dy: Tensor, bits: Tensor, layout: torch.memory_format, implementation: str) -> Tensor:
    """dy in `layout`, zero where its bit is 1; differentiable any number of times."""
    return _Masked.apply(dy, bits, layout, implementation)


class _Masked(torch.autograd.Function):
    """dy, zero where its bit is 1; its own derivative."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, bits: Tensor, layout: torch.memory_format, implementation: str) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.layout, ctx.implementation = layout, implementation
        return torch.ops.gdd_fast.mask_bits(dy.contiguous(memory_format=layout), bits, implementation)

    @staticmethod
    def backward(ctx: Any, ddy: Tensor) -> tuple[Tensor | None, ...]:
        return masked(ddy, ctx.saved_tensors[0], ctx.layout, ctx.implementation), None, None, None


# y and dy are dense, contiguous or channels_last; elements are counted in memory order. A bias (C,) is added to y
# before it is clamped.
torch.library.define(
    "gdd_fast::relu_bits_", "(Tensor(a!) y, float ceiling, str implementation, Tensor? bias=None) -> Tensor"
)
torch.library.define("gdd_fast::clamp_", "(Tensor(a!) y, float ceiling, Tensor? bias) -> ()")  # without bits, by Triton
torch.library.define("gdd_fast::mask_bits", "(Tensor dy, Tensor bits, str implementation) -> Tensor")


@torch.library.impl("gdd_fast::relu_bits_", "CompositeExplicitAutograd")
def _relu_bits_(y: Tensor, ceiling: float, implementation: str, bias: Tensor | None = None) -> Tensor:
    if implementation == "cpp":
        return torch.ops.gdd_fast_C.relu_bits_(y if bias is None else y.add_(bias[:, None, None]), ceiling)
    from gdd_fast.kernels import relu_bits as kernels

    return kernels.relu_bits_(y, ceiling, bias)


@torch.library.register_fake("gdd_fast::relu_bits_")
def _(y: Tensor, ceiling: float, implementation: str, bias: Tensor | None = None) -> Tensor:
    return y.new_empty(((y.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.impl("gdd_fast::clamp_", "CompositeExplicitAutograd")
def _clamp_(y: Tensor, ceiling: float, bias: Tensor | None) -> None:
    from gdd_fast.kernels import relu_bits as kernels

    kernels.clamp_(y, ceiling, bias)


@torch.library.register_fake("gdd_fast::clamp_")
def _(y: Tensor, ceiling: float, bias: Tensor | None) -> None:
    return None


@torch.library.impl("gdd_fast::mask_bits", "CompositeExplicitAutograd")
def _mask_bits(dy: Tensor, bits: Tensor, implementation: str) -> Tensor:
    if implementation == "cpp":
        return torch.ops.gdd_fast_C.mask_bits(dy, bits)
    from gdd_fast.kernels import relu_bits as kernels

    return kernels.mask_bits(dy, bits)


@torch.library.register_fake("gdd_fast::mask_bits")
def _(dy: Tensor, bits: Tensor, implementation: str) -> Tensor:
    return torch.empty_like(dy)
