"""Group normalisation and what surrounds it in a U-Net block, over one tensor or a concatenation that is never built.

    y = act((1 + scale) * GN(x + add; weight, bias) + shift)

`add` is NCSN++'s embedding (with the convolution's bias folded in), `scale` and `shift` are ADM's, act is SiLU or
nothing. Statistics and arithmetic are in float32 (float64 for float64) whatever the dtype of x, and so under autocast.

Backward keeps x and each group's mean and reciprocal deviation, nothing else of x's size: the SiLU is computed again.
With xhat = (u - mean) * rstd of u = x + add, t what enters the SiLU and dt its gradient,

    dt = dy * silu'(t)    dxhat = dt * (1 + scale) * weight
    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

where means go over a group, and every other gradient is a sum of dt or dt * xhat. Second derivatives go through the
definition. "cpp" has the backward of channels_last maps, and autograd's part of it; that of contiguous ones is plain
PyTorch's.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops._memory_format import DTYPES, cast, compute_dtype, empty_map, memory_format, runs_eagerly
from gdd_fast.ops.group_norm_silu import definition, fused

OPERATOR = Operator("group_norm_silu", fused=frozenset({"triton", "cpp"}))
_implementation = chooser(OPERATOR)

Activation = Literal["silu"] | None

# Values of a float32 map from which "cpp" was measured to be faster than plain PyTorch, without gradients, without and
# with `scale`.
_LEAST_VALUES = {False: 2**19, True: 2**17}


def group_norm_silu_ref(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """The definition; arguments as of `group_norm_silu`."""
    x = torch.cat(x, 1) if isinstance(x, tuple) else x
    dtype = compute_dtype(x)
    y = cast(x, dtype)
    if add is not None:
        y = y + cast(add, dtype)[:, :, None, None]
    y = F.group_norm(y, num_groups, cast(weight, dtype), cast(bias, dtype), eps)
    if scale is not None:
        y = y * (cast(scale, dtype)[:, :, None, None] + 1)
    if shift is not None:
        y = y + cast(shift, dtype)[:, :, None, None]
    if activation == "silu":
        y = F.silu(y)
    return cast(y, x.dtype)


def group_norm_silu(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = "silu",
    statistics: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """act((1 + scale) * GN(x + add; weight, bias) + shift), twice differentiable in every tensor but `statistics`.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64. Contiguous and channels_last memory, and slices of
            either, are read where they lie; memory whose rows are not evenly spaced is copied once. A pair (x, skip)
            stands for `torch.cat([x, skip], 1)`, which is not built; groups may straddle the seam.
        num_groups: divides C.
        weight, bias: (C,), of any of these dtypes.
        eps: added to the variance.
        add, scale, shift: (N, C) or (1, C), of any of these dtypes, or None.
        activation: "silu" or None.
        statistics: the statistics of x that `residual(..., statistics=True)` returned with it, for a pair a pair of
            them, each of which may be None. Fused implementations then read x once. They are trusted to be x's.
        backend: "auto", "torch", "triton" or "cpp"; float64 has "torch" alone. See gdd_fast.backend. On a CPU and
            without gradients "auto" computes small float32 maps as plain PyTorch does, which is faster there.

    Returns:
        (N, C, H, W) in x's dtype and dense; channels_last if x's (of a pair the first's) channels are innermost.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        BackendError: the backend asked for cannot run here.
    """
    pair = x if isinstance(x, tuple) else (x, None)
    given = statistics if isinstance(statistics, tuple) else (statistics, None)
    _check(*pair, num_groups, weight, bias, add, scale, shift, activation, given)
    implementation = chosen(pair[0], backend)
    keeps = torch.is_grad_enabled()
    # a compiler fuses the definition itself, and without gradients there is nothing to save
    plain = implementation == "torch" and (torch.compiler.is_compiling() or not keeps)
    if plain or (not keeps and backend == "auto" and implementation == "cpp" and _is_small(*pair, scale)):
        y = group_norm_silu_ref(
            x, num_groups, weight, bias, eps, add=add, scale=scale, shift=shift, activation=activation
        )
        # off the CPU PyTorch's norm loses channels_last; a compiler chooses for itself
        return y if torch.compiler.is_compiling() else y.contiguous(memory_format=memory_format(pair[0]))
    silu = activation == "silu"
    eager = implementation == "cpp" and keeps and runs_eagerly(pair[0])
    if eager and memory_format(pair[0]) is torch.channels_last:
        # the same kernels; autograd in Python takes longer than a small map
        op = torch.ops.gdd_fast_C.group_norm_silu_differentiable.default
        return op(*pair, num_groups, weight, bias, eps, add, scale, shift, silu)
    op = torch.ops.gdd_fast.group_norm_silu.default
    return op(*pair, num_groups, weight, bias, eps, add, scale, shift, *given, silu, implementation)[0]


def chosen(x: Tensor, backend: Backend = "auto") -> str:
    """The implementation that runs for maps like x: "torch", "triton" or "cpp". Raises BackendError if it cannot."""
    implementation = _implementation(backend, x.device.type)
    if implementation == "cpp" and backend == "auto" and torch.compiler.is_compiling():
        return "torch"  # which the compiler fuses
    if x.dtype == torch.float64 and implementation != "torch":
        if backend != "auto":
            raise BackendError(f"group_norm_silu: backend {backend!r} does not compute in float64; use 'torch'")
        return "torch"
    return implementation


def _is_small(x: Tensor, skip: Tensor | None, scale: Tensor | None) -> bool:
    """Whether plain PyTorch takes no longer than "cpp" for these maps, forward; docs/cpu_operators.md."""
    values = x.numel() if skip is None else x.numel() + skip.numel()
    return x.dtype == torch.float32 and values < _LEAST_VALUES[scale is not None]


def _check(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    statistics: tuple[Tensor | None, Tensor | None],
) -> None:
    if x.dim() != 4:
        raise InputError(f"group_norm_silu: x must be (N, C, H, W), not of shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise InputError(f"group_norm_silu: x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    n, c, h, w = x.shape
    if h == 0 or w == 0:
        raise InputError(f"group_norm_silu: x of shape {tuple(x.shape)} has no pixels to take statistics of")
    channels = [c]
    if skip is not None:
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (n, h, w) or skip.dtype != x.dtype:
            raise InputError(
                f"group_norm_silu: the second tensor of a pair must match the first but in channels, "
                f"{x.dtype} ({n}, *, {h}, {w}), not {skip.dtype} {tuple(skip.shape)}"
            )
        _check_device("skip", skip, x)
        channels.append(skip.shape[1])
        c += skip.shape[1]
    if num_groups < 1 or c % num_groups or c == 0:
        raise InputError(f"group_norm_silu: {c} channels do not divide into {num_groups} groups")
    rows = (n, c), (1, c)
    for name, tensor, fits in (
        ("weight", weight, ((c,),)),
        ("bias", bias, ((c,),)),
        ("add", add, rows),
        ("scale", scale, rows),
        ("shift", shift, rows),
    ):
        if tensor is None:
            continue
        if tensor.shape not in fits:
            want = " or ".join(map(str, fits))
            raise InputError(f"group_norm_silu: {name} must be {want}, not of shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"group_norm_silu: {name} must be floating, not {tensor.dtype}")
        _check_device(name, tensor, x)
    if activation not in ("silu", None):
        raise InputError(f"group_norm_silu: activation must be 'silu' or None, not {activation!r}")
    for tensor, width in zip(statistics, channels, strict=False):
        if tensor is None:
            continue
        if tensor.dim() != 4 or tensor.shape != (n, tensor.shape[1], 2, width) or tensor.dtype != compute_dtype(x):
            raise InputError(
                f"group_norm_silu: statistics must be {compute_dtype(x)} ({n}, *, 2, {width}), "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
        _check_device("statistics", tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(f"group_norm_silu: {name} is on {tensor.device}, x on {x.device}")


# --- the operators as torch.library knows them

torch.library.define(
    "gdd_fast::group_norm_silu",
    "(Tensor x, Tensor? skip, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, Tensor? x_statistics, Tensor? skip_statistics, bool silu, str implementation) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
)
# `needed`: whether each of the gradients of x, skip, weight, bias, add, scale and shift is; those are returned in order
torch.library.define(
    "gdd_fast::group_norm_silu_backward",
    "(Tensor dy, Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? add, Tensor? scale, Tensor? shift, "
    "Tensor mean, Tensor rstd, bool silu, bool[] needed, str implementation) -> Tensor[]",
)


@torch.library.impl("gdd_fast::group_norm_silu", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_statistics: Tensor | None,
    skip_statistics: Tensor | None,
    silu: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if implementation == "torch" or x.shape[0] == 0:
        return definition.forward(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    if implementation == "cpp":
        return fused.forward_cpp(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    statistics = (x_statistics, skip_statistics)
    return fused.forward_triton(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu, statistics)


@torch.library.register_fake("gdd_fast::group_norm_silu")
def _(x, skip, num_groups, weight, bias, eps, add, scale, shift, x_statistics, skip_statistics, silu, implementation):
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x)) for _ in range(2))
    return empty_map(x, weight.shape[0]), mean, rstd


@torch.library.impl("gdd_fast::group_norm_silu_backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    needed: list[bool],
    implementation: str,
) -> list[Tensor]:
    arguments = (dy, x, skip, weight, bias, add, scale, shift, mean, rstd, silu, needed)
    if implementation == "cpp" and x.shape[0] and memory_format(x) == torch.channels_last:
        return fused.backward_cpp(*arguments)
    if implementation == "triton" and x.shape[0]:
        return fused.backward_triton(*arguments)
    return definition.backward(*arguments)


@torch.library.register_fake("gdd_fast::group_norm_silu_backward")
def _(dy, x, skip, weight, bias, add, scale, shift, mean, rstd, silu, needed, implementation):
    maps = [empty_map(t, t.shape[1]) for t, need in zip((x, skip), needed, strict=False) if need]
    rows = [t.new_empty(t.shape) for t, need in zip((weight, bias, add, scale, shift), needed[2:], strict=True) if need]
    return maps + rows


# --- autograd

_DIFFERENTIABLE = (0, 1, 3, 4, 6, 7, 8)  # positions of x, skip, weight, bias, add, scale, shift


def _save(ctx, inputs, output) -> None:
    x, skip, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, _, _, ctx.silu, ctx.implementation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, skip, weight, bias, add, scale, shift, mean, rstd)


def _differentiate(ctx, dy: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    *inputs, mean, rstd = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if dy is None or not any(needed):
        return (None,) * 13
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(ctx, dy, inputs, needed)
    else:
        gradients = torch.ops.gdd_fast.group_norm_silu_backward(
            dy, *inputs, mean, rstd, ctx.silu, needed, ctx.implementation
        )
    gradients = iter(gradients)
    result = [None] * 13
    for i, need in zip(_DIFFERENTIABLE, needed, strict=True):
        result[i] = next(gradients) if need else None
    return tuple(result)


def _differentiable_gradients(ctx, dy: Tensor, inputs: list[Tensor | None], needed: list[bool]) -> tuple[Tensor, ...]:
    """The gradients as functions that can be differentiated again (create_graph): rare, so by the definition."""
    # fresh views, so that a gradient stops here even where one input was computed from another
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, skip, weight, bias, add, scale, shift = inputs
    activation = "silu" if ctx.silu else None
    y = group_norm_silu_ref(
        x if skip is None else (x, skip),
        ctx.num_groups,
        weight,
        bias,
        ctx.eps,
        add=add,
        scale=scale,
        shift=shift,
        activation=activation,
    )
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    return torch.autograd.grad(y, wanted, dy, create_graph=True)


torch.library.register_autograd("gdd_fast::group_norm_silu", _differentiate, setup_context=_save)
