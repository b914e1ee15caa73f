"""The end of a residual branch: `(h + skip + bias) * scale`, optionally with the statistics that the next norm needs.

Fused, the sum is taken in float32 and rounded once, in one pass over h and skip. The operator is linear, so nothing is
saved for backward, which is plain PyTorch: `dy * scale`, and its sum for the bias.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import (
    DTYPES,
    channel_statistics_ref,
    compute_dtype,
    empty_map,
    evenly_spaced,
    statistics_parts,
)
from gdd_fast.ops._planned import plans, wanted

OPERATOR = Operator("residual", fused=frozenset({"triton"}), float64=False)
_choose = chooser(OPERATOR)


def residual_ref(h: Tensor, skip: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The definition; arguments as for `residual`."""
    y = h + skip
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    return y if scale == 1 else y.mul_(scale)


@overload
def residual(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    statistics: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def residual(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    statistics: bool,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def residual(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    statistics: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """(h + skip + bias) * scale, twice differentiable.

    Args:
        h, skip: (N, C, H, W) of one dtype, float32, bfloat16, float16 or float64, in any memory format. Memory with
        unevenly spaced rows is copied once.
        bias: (C,), float32 or h's dtype, or None.
        scale: a number.
        statistics: also return the statistics of the result for `group_norm_silu(..., statistics=...)`.
        backend: "auto", "torch" or "triton"; float64 has only "torch". See gdd_fast.backend.

    Returns:
        y (N, C, H, W) in h's dtype, dense, channels_last if h's channels are innermost ("torch": as eager torch adds).
        With `statistics` the pair (y, s): s is float32 (float64 for float64) (N, P, 2, C), each channel's mean and sum
        of squared deviations over each of P runs of pixels (see gdd_fast.ops._memory_format); it carries no gradient.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        BackendError: the requested backend cannot run here.
    """
    if wanted(h, backend) and (planned := plans(_plan)) is not None:
        extension, cache = planned
        pair = extension.planned_residual(cache, h, skip, bias, scale, statistics, backend)
        if pair is not None:
            return pair if statistics else pair[0]
    if _chosen(h, skip, bias, statistics, backend) == "torch":
        y = residual_ref(h, skip, bias, scale)
        return (y, channel_statistics_ref(y)) if statistics else y
    y, s = torch.ops.gdd_fast.residual.default(h, skip, bias, float(scale), statistics)
    return (y, s) if statistics else y


def _plan(direction: str, backend: Backend, tensors: Sequence[Any], numbers: tuple[float, ...]) -> tuple | None:
    """The launch plan of the Triton kernel for such a call (see gdd_fast.ops._planned)."""
    from gdd_fast.kernels._plans import plan

    (h, skip, bias), (scale, statistics) = tensors, numbers
    if _chosen(h, skip, bias, bool(statistics), backend) != "triton":
        return None
    return plan(lambda: _launched(h, skip, bias, scale, bool(statistics)), tensors)


def _chosen(h: Tensor, skip: Tensor, bias: Tensor | None, statistics: bool, backend: Backend) -> str:
    """The implementation that runs; raises what `residual` raises."""
    if h.dim() != 4 or h.shape != skip.shape:
        raise InputError(
            f"residual: h and skip must be (N, C, H, W) of one shape, not {tuple(h.shape)} and {tuple(skip.shape)}"
        )
    if h.dtype not in DTYPES or h.dtype != skip.dtype:
        raise InputError(
            f"residual: h and skip must be of one dtype, float32, bfloat16, float16 or float64, "
            f"not {h.dtype} and {skip.dtype}"
        )
    if bias is not None and (bias.shape != h.shape[1:2] or bias.dtype not in (h.dtype, torch.float32)):
        raise InputError(
            f"residual: bias must be float32 or {h.dtype} ({h.shape[1]},), not {bias.dtype} {tuple(bias.shape)}"
        )
    for name, tensor in (("skip", skip), ("bias", bias)):
        if tensor is not None and tensor.device != h.device:
            raise InputError(f"residual: {name} is on {tensor.device}, h on {h.device}")
    if statistics and (h.shape[2] == 0 or h.shape[3] == 0):
        raise InputError(f"residual: h of shape {tuple(h.shape)} has no pixels to take statistics of")
    return _choose(backend, h.device.type, h.dtype == torch.float64)


# Without statistics the second result is empty.
torch.library.define(
    "gdd_fast::residual",
    "(Tensor h, Tensor skip, Tensor? bias, float scale, bool statistics) -> (Tensor y, Tensor statistics)",
)


@torch.library.impl("gdd_fast::residual", "CompositeExplicitAutograd")
def _forward(h: Tensor, skip: Tensor, bias: Tensor | None, scale: float, statistics: bool) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    return _launched(evenly_spaced(h), evenly_spaced(skip), bias, scale, statistics)


def _launched(h: Tensor, skip: Tensor, bias: Tensor | None, scale: float, statistics: bool) -> tuple[Tensor, Tensor]:
    """The same by the kernel, for maps with evenly spaced pixels."""
    from gdd_fast.kernels import residual as kernels

    y, s = _empty(h, skip, bias, scale, statistics)
    if y.numel():
        kernels.residual(h, skip, bias, scale, y, s if statistics else None)
    return y, s


@torch.library.register_fake("gdd_fast::residual")
def _empty(h: Tensor, skip: Tensor, bias: Tensor | None, scale: float, statistics: bool) -> tuple[Tensor, Tensor]:
    n, c, height, width = h.shape
    shape = (n, statistics_parts(height * width), 2, c) if statistics else (0,)
    return empty_map(h, c), h.new_empty(shape, dtype=compute_dtype(h))


def _save(ctx, inputs, output) -> None:
    _, _, bias, ctx.scale, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    dx = dy if ctx.scale == 1 else dy * ctx.scale
    dbias = dx.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx if ctx.needs_input_grad[0] else None, dx if ctx.needs_input_grad[1] else None, dbias, None, None


torch.library.register_autograd("gdd_fast::residual", _differentiate, setup_context=_save)
