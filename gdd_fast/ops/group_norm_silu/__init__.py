"""Group normalisation and the operations around it in a U-Net block, for a tensor or a concatenation never built.

    y = act((1 + scale) * GN(x + add; weight, bias) + shift)

`add` is NCSN++'s embedding (with the convolution's bias folded in), `scale` and `shift` are ADM's, act is SiLU or
nothing. Statistics and arithmetic are in float32 (float64 for float64) whatever the dtype of x, and so under autocast.

Backward keeps x and each group's mean and reciprocal deviation, nothing else of x's size: the SiLU is recomputed. With
xhat = (u - mean) * rstd for u = x + add, t the SiLU's input and dt the gradient of t,

    dt = dy * silu'(t)    dxhat = dt * (1 + scale) * weight
    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

where means are over a group, and every other gradient is a sum of dt or dt * xhat. Second derivatives use the
definition. "cpp" has the backward of channels_last maps, with autograd's part; that of contiguous maps is plain
PyTorch.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from gdd_fast.backend import Backend, Operator, chooser, extension
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import compute_dtype, empty_map, memory_format, runs_eagerly
from gdd_fast.ops._planned import plans, wanted
from gdd_fast.ops.group_norm_silu import definition, fused
from gdd_fast.ops.group_norm_silu.norm_inputs import DIFFERENTIABLE, LENGTH, SCHEMA, NormInputs, Statistics, check

OPERATOR = Operator("group_norm_silu", fused=frozenset({"triton", "cpp"}), float64=False)
_choose = chooser(OPERATOR)

Activation = Literal["silu"] | None


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
    """The definition; arguments as for `group_norm_silu`."""
    first, skip = x if isinstance(x, tuple) else (x, None)
    silu = activation == "silu"
    return definition.formula(NormInputs(first, skip, num_groups, weight, bias, eps, add, scale, shift, silu))


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
    """act((1 + scale) * GN(x + add; weight, bias) + shift), twice differentiable in all tensors except `statistics`.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64. Contiguous and channels_last memory, and slices of
            either, are read in place; memory with unevenly spaced rows is copied once. A pair (x, skip) stands for
            `torch.cat([x, skip], 1)`, which is never built; groups may straddle the seam.
        num_groups: a divisor of C.
        weight, bias: (C,), of any of these dtypes.
        eps: added to the variance.
        add, scale, shift: (N, C) or (1, C), of any of these dtypes, or None.
        activation: "silu" or None.
        statistics: the statistics of x that `residual(..., statistics=True)` returned with it; for a pair, a pair of
        them, each of which may be None. Fused implementations then read x once. They are not checked to be x's.
        backend: "auto", "torch", "triton" or "cpp"; float64 has only "torch". See gdd_fast.backend.

    Returns:
        (N, C, H, W) in x's dtype and dense; channels_last if x's channels (for a pair, the first's) are innermost.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        BackendError: the requested backend cannot run here.
    """
    first, skip = x if isinstance(x, tuple) else (x, None)
    known = statistics if isinstance(statistics, tuple) else (statistics, None)
    silu = activation == "silu"
    if silu or activation is None:
        tensors = first, skip, num_groups, weight, bias, eps, add, scale, shift, silu
        y = None
        if wanted(first, backend) and (planned := plans(_plan)) is not None:
            module, cache = planned
            y = module.planned_group_norm_silu(cache, *tensors, *known, backend)
        elif first.is_cpu and known[0] is known[1] is None and runs_eagerly(first) and chosen(first, backend) == "cpp":
            alone = not silu and skip is add is scale is shift is None
            if alone and backend == "auto" and not torch.is_grad_enabled() and _stock_is_faster(first, weight, bias):
                check(NormInputs(*tensors), known)
                return functional.group_norm(first, num_groups, weight, bias, eps)
            y = extension().cpu_group_norm_silu(*tensors)  # type: ignore[union-attr]
        if y is not None:  # else the call has to be refused, or is for another implementation
            return y
    inputs = NormInputs(first, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    if activation not in ("silu", None):
        raise InputError(f"group_norm_silu: activation must be 'silu' or None, not {activation!r}")
    implementation = _decided(inputs, known, backend)
    # a compiler fuses the definition itself, and without gradients there is nothing to save
    if implementation == "torch" and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
        y = definition.formula(inputs)
        # except on CPUs PyTorch's norm loses channels_last; a compiler chooses layouts itself
        return y if torch.compiler.is_compiling() else y.contiguous(memory_format=memory_format(inputs.x))
    return torch.ops.gdd_fast.group_norm_silu.default(*inputs, *known, implementation)[0]


def _stock_is_faster(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether PyTorch's norm alone is faster than ours for a large channels_last map on this CPU
    (docs/cpu_operators.md), and accepts these parameters unconverted. It computes in float32 too."""
    if x.dim() != 4 or x.numel() < 1 << 20 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.shape[2] * x.shape[3] < 1024 or weight.dtype != bias.dtype:
        return False
    rounds_slowly = x.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return weight.dtype in (torch.float32, x.dtype) if rounds_slowly else x.dtype == weight.dtype == torch.float32


def _plan(direction: str, backend: Backend, tensors: Sequence[Any], numbers: tuple[float, ...]) -> tuple | None:
    """The launch plan of the Triton kernels for such a call (see gdd_fast.ops._planned)."""
    from gdd_fast.kernels._plans import plan

    if direction == "backward":
        dy, x, skip, weight, bias, add, scale, shift, mean, rstd = tensors
        silu, bits = numbers
        inputs = NormInputs(x, skip, mean.shape[1], weight, bias, 0.0, add, scale, shift, bool(silu))
        needed = [bool(int(bits) >> i & 1) for i in range(len(DIFFERENTIABLE))]
        return plan(lambda: fused.launch_backward(dy, inputs, mean, rstd, needed), tensors)
    x, skip, weight, bias, add, scale, shift, *known = tensors
    groups, eps, silu = numbers
    inputs = NormInputs(x, skip, int(groups), weight, bias, eps, add, scale, shift, bool(silu))
    if _decided(inputs, tuple(known), backend) != "triton" or x.shape[0] == 0:
        return None
    return plan(lambda: fused.forward_triton(inputs, tuple(known)), tensors)


def _decided(inputs: NormInputs, known: Statistics, backend: Backend) -> str:
    """The implementation that runs; raises what `group_norm_silu` raises."""
    check(inputs, known)
    return chosen(inputs.x, backend)


def chosen(x: Tensor, backend: Backend = "auto") -> str:
    """The implementation that runs for maps like x: "torch", "triton" or "cpp". Raises BackendError if it cannot."""
    implementation = _choose(backend, x.device.type, x.dtype == torch.float64)
    if implementation == "cpp" and backend == "auto" and torch.compiler.is_compiling():
        return "torch"  # which the compiler fuses
    return implementation


# --- the operators as torch.library knows them

torch.library.define(
    "gdd_fast::group_norm_silu",
    f"({SCHEMA}, Tensor? x_statistics, Tensor? skip_statistics, str implementation) -> (Tensor, Tensor, Tensor)",
)
# `needed`: whether each of the gradients of x, skip, weight, bias, add, scale and shift is; those are returned in order
torch.library.define(
    "gdd_fast::group_norm_silu_backward",
    f"(Tensor dy, {SCHEMA}, Tensor mean, Tensor rstd, bool[] needed, str implementation) -> Tensor[]",
)


@torch.library.impl("gdd_fast::group_norm_silu", "CompositeExplicitAutograd")
def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C, H, W) and each group's mean and reciprocal deviation (N, groups)."""
    inputs, (x_statistics, skip_statistics, implementation) = NormInputs(*arguments[:LENGTH]), arguments[LENGTH:]
    if implementation == "torch" or inputs.x.shape[0] == 0:
        return definition.forward(inputs)
    if implementation == "cpp":
        return fused.forward_cpp(inputs)
    return fused.forward_triton(inputs, (x_statistics, skip_statistics))


@torch.library.register_fake("gdd_fast::group_norm_silu")
def _(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    i = NormInputs(*arguments[:LENGTH])
    mean, rstd = (i.x.new_empty((i.x.shape[0], i.num_groups), dtype=compute_dtype(i.x)) for _ in range(2))
    return empty_map(i.x, i.weight.shape[0]), mean, rstd


@torch.library.impl("gdd_fast::group_norm_silu_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, *arguments) -> list[Tensor]:
    inputs, (mean, rstd, needed, implementation) = NormInputs(*arguments[:LENGTH]), arguments[LENGTH:]
    compute = definition.backward
    if implementation == "cpp" and inputs.x.shape[0] and memory_format(inputs.x) == torch.channels_last:
        compute = fused.backward_cpp
    elif implementation == "triton" and inputs.x.shape[0]:
        compute = fused.backward_triton
    return compute(dy, inputs, mean, rstd, needed)


@torch.library.register_fake("gdd_fast::group_norm_silu_backward")
def _(dy: Tensor, *arguments) -> list[Tensor]:
    i, (_, _, needed, _) = NormInputs(*arguments[:LENGTH]), arguments[LENGTH:]
    maps = [empty_map(t, t.shape[1]) for t, need in zip(i.maps, needed[:2], strict=True) if need and t is not None]
    rows = zip(i.parameters, needed[2:], strict=True)
    return maps + [t.new_empty(t.shape) for t, need in rows if need and t is not None]


# --- autograd


def _save(ctx, inputs, output) -> None:
    i, (*_, ctx.implementation) = NormInputs(*inputs[:LENGTH]), inputs[LENGTH:]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mean, rstd, i.x, i.skip, *i.parameters)
    ctx.options = i.num_groups, i.eps, i.silu


def _differentiate(ctx, dy: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    mean, rstd, x, skip, weight, bias, add, scale, shift = ctx.saved_tensors
    num_groups, eps, silu = ctx.options
    inputs = NormInputs(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    needed = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    result: list[Tensor | None] = [None] * (LENGTH + 3)
    if dy is None or not any(needed):
        return tuple(result)
    if torch.is_grad_enabled():
        # Gradients that will be differentiated again (create_graph): rare, so by the definition. Fresh views make
        # gradients stop here even if one input was computed from another.
        inputs = inputs.mapped(*[lambda t: t.view_as(t)] * 2)
        wanted: list[Any] = [inputs[i] for i, need in zip(DIFFERENTIABLE, needed, strict=True) if need]
        gradients = torch.autograd.grad(definition.formula(inputs), wanted, dy, create_graph=True)
    else:
        op = torch.ops.gdd_fast.group_norm_silu_backward
        gradients = op(dy, *inputs, mean, rstd, needed, ctx.implementation)
    given = iter(gradients)
    for i, need in zip(DIFFERENTIABLE, needed, strict=True):
        result[i] = next(given) if need else None
    return tuple(result)


torch.library.register_autograd("gdd_fast::group_norm_silu", _differentiate, setup_context=_save)
