"""Max pooling over 2x2 windows that keeps one byte per output for backward.

PyTorch's own keeps the input and an int64 index per output: in float32, six times the output's memory. A window has
four places, so a byte suffices: 2 * row + column of the largest value, the first of equal ones, as in PyTorch.

For fixed places of the maxima the operator is linear, so it can be differentiated any number of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser, extension
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import memory_format, runs_eagerly
from gdd_fast.ops._planned import plans, wanted

OPERATOR = Operator("max_pool2x2", fused=frozenset({"triton", "cpp"}))
_choose = chooser(OPERATOR)


def max_pool2x2_ref(x: Tensor) -> Tensor:
    """The definition: PyTorch's pooling with stride 2."""
    return F.max_pool2d(x, 2)


def max_pool2x2(x: Tensor, backend: Backend = "auto") -> Tensor:
    """The largest value of each 2x2 window, stride 2; an odd last row or column is left out.

    Args:
        x: (N, C, H, W), floating, H and W of at least 2. Dense contiguous and channels_last memory is read in place,
        any other is copied once.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (N, C, H // 2, W // 2) in x's dtype and memory format.

    Raises:
        InputError: x is not four-dimensional or floating, or is smaller than a window.
        BackendError: the requested backend cannot run here.
    """
    if wanted(x, backend) and (planned := plans(_plan)) is not None:
        module, cache = planned
        y = module.planned_max_pool2x2(cache, x, backend)
        if y is not None:
            return y
    implementation = _chosen(x, backend)
    if implementation == "torch":
        return max_pool2x2_ref(x)
    if implementation == "cpp" and runs_eagerly(x):
        y = extension().planned_max_pool2x2(None, x, backend)  # type: ignore[union-attr]
        if y is not None:
            return y
    return _MaxPool.apply(x.contiguous(memory_format=memory_format(x)), implementation)


def _chosen(x: Tensor, backend: Backend) -> str:
    """The implementation that runs; raises what `max_pool2x2` raises."""
    if x.dim() != 4 or not x.is_floating_point() or min(x.shape[2:]) < 2:
        raise InputError(
            f"max_pool2x2: x must be floating (N, C, H, W) of at least 2x2 pixels, not {x.dtype} {tuple(x.shape)}"
        )
    return _choose(backend, x.device.type)


def _plan(direction: str, backend: Backend, tensors: Sequence[Any], numbers: tuple[float, ...]) -> tuple | None:
    """The launch plan of the Triton kernels for such a call (see gdd_fast.ops._planned)."""
    from gdd_fast.kernels import max_pool2x2 as kernels
    from gdd_fast.kernels._plans import plan

    if direction == "backward":
        dy, places, dx = tensors
        (channels_last,) = numbers

        def spread() -> list[Tensor]:
            kernels.max_pool2x2_backward(dy, places, dx, bool(channels_last))
            return []

        return plan(spread, tensors)
    (x,) = tensors
    if _chosen(x, backend) != "triton":
        return None
    return plan(lambda: kernels.max_pool2x2(x), tensors)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, implementation: str) -> Tensor:
        y, places = torch.ops.gdd_fast.max_pool2x2(x, implementation)
        ctx.save_for_backward(places)
        ctx.size, ctx.layout, ctx.implementation = x.shape[2:], memory_format(x), implementation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(dy, ctx.saved_tensors[0], ctx.size, ctx.layout, ctx.implementation), None


class _Spread(torch.autograd.Function):
    """The gradient of pooling: every value goes to the place of its maximum, zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, places: Tensor, size: torch.Size, layout: torch.memory_format, implementation: str
    ) -> Tensor:
        ctx.save_for_backward(places)
        dy = dy.contiguous(memory_format=layout)
        return torch.ops.gdd_fast.max_pool2x2_backward(dy, places, *size, layout is torch.channels_last, implementation)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return collect_ref(ddx, ctx.saved_tensors[0]), None, None, None, None


def collect_ref(x: Tensor, places: Tensor) -> Tensor:
    """The value of x (N, C, H, W) at each window's place (N, C, H // 2, W // 2), differentiable in x."""
    windows = x[:, :, : places.shape[2] * 2, : places.shape[3] * 2]
    y = windows[:, :, ::2, ::2]
    for place in range(1, 4):
        y = torch.where(places == place, windows[:, :, place // 2 :: 2, place % 2 :: 2], y)
    return y


# x, dy and places are dense. Backward takes the format as an argument, as strides of 1x1 places do not show it.
torch.library.define("gdd_fast::max_pool2x2", "(Tensor x, str implementation) -> (Tensor, Tensor)")
torch.library.define(
    "gdd_fast::max_pool2x2_backward",
    "(Tensor dy, Tensor places, SymInt height, SymInt width, bool channels_last, str implementation) -> Tensor",
)


@torch.library.impl("gdd_fast::max_pool2x2", "CompositeExplicitAutograd")
def _max_pool2x2(x: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation == "cpp":
        return torch.ops.gdd_fast_C.max_pool2x2(x)
    from gdd_fast.kernels import max_pool2x2 as kernels

    return kernels.max_pool2x2(x)


@torch.library.register_fake("gdd_fast::max_pool2x2")
def _(x: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    y = torch.empty((n, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.impl("gdd_fast::max_pool2x2_backward", "CompositeExplicitAutograd")
def _max_pool2x2_backward(
    dy: Tensor, places: Tensor, height: int, width: int, channels_last: bool, implementation: str
) -> Tensor:
    if implementation == "cpp":
        return torch.ops.gdd_fast_C.max_pool2x2_backward(dy, places, height, width, channels_last)
    from gdd_fast.kernels import max_pool2x2 as kernels

    dx = _empty(dy, height, width, channels_last)
    if height % 2 or width % 2:
        dx.zero_()  # the row and column outside all windows
    kernels.max_pool2x2_backward(dy, places, dx, channels_last)
    return dx


@torch.library.register_fake("gdd_fast::max_pool2x2_backward")
def _(dy: Tensor, places: Tensor, height: int, width: int, channels_last: bool, implementation: str) -> Tensor:
    return _empty(dy, height, width, channels_last)


def _empty(dy: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*dy.shape[:2], height, width), dtype=dy.dtype, device=dy.device, memory_format=layout)
