"""A frozen convolution followed by ReLU or ReLU6: one bit per element is kept for backward.

PyTorch saves the convolution's input and the activation's output. Here neither is needed: besides the weight, a bit an
element says where the activation is flat. Bit i of byte j belongs to element 8 j + i of the output in its own memory
order (contiguous or channels_last), and is 1 where the gradient is zero: y <= 0, and y >= 6 for ReLU6, so NaN stays and
passes its gradient on.

Everything after the forward pass is linear, so the operator can be differentiated any number of times.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, resolve
from gdd_fast.errors import ConfigError
from gdd_fast.ops._memory_format import memory_format, runs_eagerly
from gdd_fast.ops.frozen_conv2d import (
    Geometry,
    Size2,
    convolve,
    frozen_conv2d,
    geometry,
    input_gradient,
    prepare,
)

OPERATOR = Operator("frozen_conv2d_relu", fused=frozenset({"triton", "cpp"}))

Activation = Literal["relu", "relu6"]
CEILING: dict[str, float] = {"relu": math.inf, "relu6": 6.0}

# A 64-bit word of eight 0/1 bytes times this has the eight bits, first byte lowest, in its top byte.
_GATHER = 0x0102040810204080
# A byte repeated eight times, and of the i-th copy its i-th bit.
_REPEAT, _PICK = 0x0101010101010101, 0x8040201008040201 - (1 << 64)


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
    """The definition; arguments as of `frozen_conv2d_relu`. PyTorch keeps the result for backward."""
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
        x, weight, bias, stride, padding, dilation, groups: as of `frozen_conv2d`; fold a frozen batch norm into weight
            and bias first.
        activation: "relu" or "relu6", the clamp to [0, 6].
        backend: "auto", "torch", "triton" or "cpp": who packs the bits; "cpp" does autograd's part too. The convolution
            is always the library's.

    Returns:
        (N, K, H', W') in the compute type.

    Raises:
        InputError: as `frozen_conv2d`.
        ConfigError: an activation of another name.
        BackendError: the backend asked for cannot run here.
    """
    if activation not in CEILING:
        raise ConfigError(f"frozen_conv2d_relu: activation must be one of {', '.join(CEILING)}, not {activation!r}")
    chosen = _choose(backend, x.device.type)
    if chosen == "torch":
        return frozen_conv2d_relu_ref(x, weight, bias, stride, padding, dilation, groups, activation)
    x, weight, bias = prepare(x, weight, bias, "frozen_conv2d_relu")
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return F.relu_(y) if activation == "relu" else F.relu6(y, inplace=True)
    g, ceiling = geometry(stride, padding, dilation, groups), CEILING[activation]
    if chosen == "cpp" and runs_eagerly(x):
        return torch.ops.gdd_fast_C.frozen_conv2d_relu.default(x, weight, bias, *g, ceiling)
    return _ConvolutionRelu.apply(x, weight, bias, g, ceiling, chosen)


def _choose(backend: Backend, device: str) -> str:
    # the compiler cannot look for extensions: compiled code leaves the choice to the operators below
    return backend if torch.compiler.is_compiling() else resolve(backend, OPERATOR, device)


class _ConvolutionRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, ceiling: float, backend: str
    ) -> Tensor:
        y = convolve(x, weight, bias, g)
        ctx.out_format = memory_format(y)
        if not y.is_contiguous(memory_format=ctx.out_format):
            # not at every call: where that is y itself, torch 2.11 compiles what changes it below to a wrong gradient
            y = y.contiguous(memory_format=ctx.out_format)
        bits = torch.ops.gdd_fast.relu_bits_(y, ceiling, backend)
        ctx.save_for_backward(weight, bits)
        ctx.shape, ctx.format, ctx.geometry, ctx.backend = x.shape, memory_format(x), g, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, bits = ctx.saved_tensors
        dy = masked(dy, bits, ctx.out_format, ctx.backend)
        dx = input_gradient(dy, weight, ctx.shape, ctx.format, ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None


def masked(dy: Tensor, bits: Tensor, layout: torch.memory_format, backend: str) -> Tensor:
    """dy in `layout`, zero where the bits say so; differentiable any number of times."""
    return _Masked.apply(dy, bits, layout, backend)


class _Masked(torch.autograd.Function):
    """dy, zero where the bits say so; its own derivative."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, bits: Tensor, layout: torch.memory_format, backend: str) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.layout, ctx.backend = layout, backend
        return torch.ops.gdd_fast.mask_bits(dy.contiguous(memory_format=layout), bits, backend)

    @staticmethod
    def backward(ctx: Any, ddy: Tensor) -> tuple[Tensor | None, ...]:
        return masked(ddy, ctx.saved_tensors[0], ctx.layout, ctx.backend), None, None, None


# y and dy are dense, contiguous or channels_last; elements are counted as they lie in memory.
torch.library.define("gdd_fast::relu_bits_", "(Tensor(a!) y, float ceiling, str backend) -> Tensor")
torch.library.define("gdd_fast::mask_bits", "(Tensor dy, Tensor bits, str backend) -> Tensor")


@torch.library.impl("gdd_fast::relu_bits_", "CompositeExplicitAutograd")
def _relu_bits_(y: Tensor, ceiling: float, backend: Backend) -> Tensor:
    match resolve(backend, OPERATOR, y.device.type):
        case "triton":
            from gdd_fast.kernels import frozen_conv2d_relu as kernels

            return kernels.relu_bits_(y, ceiling)
        case "cpp":
            return torch.ops.gdd_fast_C.relu_bits_(y, ceiling)
        case _:
            return relu_bits_ref_(y, ceiling)


@torch.library.register_fake("gdd_fast::relu_bits_")
def _(y: Tensor, ceiling: float, backend: Backend) -> Tensor:
    return y.new_empty(((y.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.impl("gdd_fast::mask_bits", "CompositeExplicitAutograd")
def _mask_bits(dy: Tensor, bits: Tensor, backend: Backend) -> Tensor:
    match resolve(backend, OPERATOR, dy.device.type):
        case "triton":
            from gdd_fast.kernels import frozen_conv2d_relu as kernels

            return kernels.mask_bits(dy, bits)
        case "cpp":
            return torch.ops.gdd_fast_C.mask_bits(dy, bits)
        case _:
            return mask_bits_ref(dy, bits)


@torch.library.register_fake("gdd_fast::mask_bits")
def _(dy: Tensor, bits: Tensor, backend: Backend) -> Tensor:
    return torch.empty_like(dy)


def relu_bits_ref_(y: Tensor, ceiling: float) -> Tensor:
    """Clamp y to [0, ceiling] in place; the bits of where that is flat, uint8 (ceil(numel / 8),)."""
    flat = _in_memory_order(y)
    blocked = flat <= 0
    if ceiling < math.inf:
        blocked |= flat >= ceiling
    y.clamp_(0, None if ceiling == math.inf else ceiling)
    blocked = F.pad(blocked.view(torch.uint8), (0, -flat.numel() % 8))
    return (blocked.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def mask_bits_ref(dy: Tensor, bits: Tensor) -> Tensor:
    """dy, zero where its bit is 1, in a new tensor of the same strides."""
    flat = _in_memory_order(dy)
    blocked = (bits.to(torch.int64) * _REPEAT & _PICK).view(torch.uint8)[: flat.numel()] != 0
    dx = torch.empty_like(dy)
    torch.where(blocked, flat.new_zeros(()), flat, out=_in_memory_order(dx))
    return dx


def _in_memory_order(x: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)
