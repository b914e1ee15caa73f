"""One pass over all parameters of a network: Adam and the moving average of the weights.

A step with a NaN or an infinity in any gradient changes nothing and is only counted. Otherwise, with t the number of
steps taken (Kingma & Ba, arXiv 1412.6980, written as torch.optim.Adam computes it):

    g <- g + weight_decay * p        m <- lerp(m, g, 1 - beta1)        v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    average <- lerp(average, p, average_weight)

Unfused, this reads or writes memory of the parameters' size 11 times or more; here 9 times (8 with beta1 = 0), after
one check of the gradients. `gdd_fast.training.optimizer` wraps it as an optimizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import InputError

OPERATOR = Operator("adam_ema", fused=frozenset({"cuda", "cpp"}))
_choose = chooser(OPERATOR)


@dataclass(frozen=True)
class Group:
    """The next `tensors` parameters and their options; they use the next learning rate."""

    tensors: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


def check_options(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise InputError for options out of range."""
    if not (all(0 <= beta < 1 for beta in betas) and eps >= 0 and weight_decay >= 0):
        raise InputError(
            f"adam_ema_: betas must be in [0, 1), eps and weight_decay not negative, and they are {tuple(betas)}, "
            f"{eps} and {weight_decay}"
        )


def adam_ema_ref_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    step: Tensor,
    skipped: Tensor,
    lr: Tensor,
    average_weight: Tensor,
    groups: Sequence[Group],
) -> None:
    """The definition, in any floating dtype; arguments as for `adam_ema_`. It waits for the device once.

    "torch" runs this on a CPU, where waiting costs nothing, and `adam_ema_waitless_` elsewhere.
    """
    if not params:
        return
    # the largest magnitude propagates NaN and infinity, and cannot overflow as a sum of squares can
    norms = torch._foreach_norm([g for g in grads if g.numel()], ord=float("inf"))
    largest = torch.stack(norms).max() if norms else step
    numbers = [number.double().view(-1) for number in (largest, step + 1, average_weight, lr)]
    largest, t, weight, *rates = torch.cat(numbers).tolist()
    if not math.isfinite(largest):
        skipped += 1
        return
    step += 1
    first = 0
    for group, rate in zip(groups, rates, strict=True):
        part = slice(first, first + group.tensors)
        first += group.tensors
        if group.tensors:
            p, g, m, v = params[part], grads[part], exp_avgs[part], exp_avg_sqs[part]
            beta1, beta2 = group.betas
            if group.weight_decay:
                g = list(torch._foreach_add(g, p, alpha=group.weight_decay))
            torch._foreach_lerp_(m, g, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, 1 - beta2)
            denominators = torch._foreach_sqrt(v)
            torch._foreach_div_(denominators, (1 - beta2**t) ** 0.5)
            torch._foreach_add_(denominators, group.eps)
            torch._foreach_addcdiv_(p, m, denominators, -rate / (1 - beta1**t))
    if averages:
        torch._foreach_lerp_(averages, params, weight)


def adam_ema_waitless_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    step: Tensor,
    skipped: Tensor,
    lr: Tensor,
    average_weight: Tensor,
    groups: Sequence[Group],
) -> None:
    """The same by PyTorch's fused Adam, in float32: the device decides whether to step, and the host never waits.

    "torch" runs this on a GPU. It can be captured in a CUDA graph.
    """
    if not params:
        return
    norms = torch._foreach_norm([g for g in grads if g.numel()], ord=float("inf"))
    finite = torch.stack(norms).max().isfinite() if norms else torch.ones_like(step, dtype=torch.bool)
    finite = finite.view_as(step)
    left_out = finite.logical_not()
    found_inf, count = left_out.float(), step + 1
    first = 0
    for index, group in enumerate(groups):
        part = slice(first, first + group.tensors)
        first += group.tensors
        if group.tensors:
            torch._fused_adam_(
                params[part],
                grads[part],
                exp_avgs[part],
                exp_avg_sqs[part],
                [],
                [count] * group.tensors,
                lr=lr.view(-1)[index].float(),
                beta1=group.betas[0],
                beta2=group.betas[1],
                weight_decay=group.weight_decay,
                eps=group.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
    step += finite
    skipped += left_out.view_as(skipped)
    if averages:
        # one weight per tensor: a tensor of weights is exact at 0 and 1, as the number's lerp is
        weight = (average_weight.view_as(step) * finite).float().view(())
        torch._foreach_lerp_(averages, params, [weight] * len(params))


def adam_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    skipped: Tensor,
    lr: Tensor,
    *,
    averages: Sequence[Tensor] = (),
    average_weight: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    groups: Sequence[Group] | None = None,
    backend: Backend = "auto",
) -> None:
    """One step, in place: all of it, or only `skipped += 1` if a gradient is not finite.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float32, dense, one of each per parameter. A gradient with another memory
        layout than its parameter's is copied once first; the others must agree.
        step, skipped: float32 and int64 of one number; the steps taken and the steps skipped.
        lr, average_weight: float64 of one number. Like the two above they are on the parameters' device, where a
            replayed CUDA graph reads and writes them. With `groups`, lr has a number for each, (len(groups),).
        averages: moving averages of the parameters, float32, or empty.
        groups: consecutive parameters with options of their own, instead of `betas`, `eps` and `weight_decay`. The
        finite check and the counts cover all groups together.
        backend: "auto", "torch", "cuda" or "cpp"; see gdd_fast.backend. On a GPU both "torch" and "cuda" can be
        captured in graphs and never wait for the device.

    Raises:
        InputError: lists, dtypes or layouts that do not fit.
        BackendError: the requested backend cannot run here.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages}
    for name, tensors in lists.items():
        if len(tensors) != len(params) and not (len(tensors) == 0 and name == "averages"):
            raise InputError(f"adam_ema_: {len(tensors)} {name} for {len(params)} parameters")
        for t, p in zip(tensors, params, strict=False):
            _check_like(name, t, p)
    groups = [Group(len(params), betas, eps, weight_decay)] if groups is None else groups
    if sum(group.tensors for group in groups) != len(params):
        raise InputError(f"adam_ema_: groups of {[g.tensors for g in groups]} tensors for {len(params)} parameters")
    for group in groups:
        check_options(group.betas, group.eps, group.weight_decay)
    for name, t, dtype, count in (
        ("step", step, torch.float32, 1),
        ("skipped", skipped, torch.int64, 1),
        ("lr", lr, torch.float64, len(groups)),
        ("average_weight", average_weight, torch.float64, 1),
    ):
        if t.dtype != dtype or t.numel() != count or not t.is_contiguous():
            wanted = "one number" if count == 1 else f"a dense tensor of {count} numbers, one per group,"
            raise InputError(f"adam_ema_: {name} must be {wanted} of {dtype}, not {t.dtype} {tuple(t.shape)}")
        if params and t.device != params[0].device:
            raise InputError(f"adam_ema_: {name} is on {t.device}, the parameters on {params[0].device}")
    if not all(map(_dense, params)):
        raise InputError("adam_ema_: the parameters must be dense in memory: call .contiguous() on those that are not")
    if any(p.device != params[0].device for p in params):
        raise InputError("adam_ema_: the parameters must all be on one device")
    if not params:
        return
    implementation = _choose(backend, params[0].device.type)
    grads = [_laid_out_like(g, p) for g, p in zip(grads, params, strict=True)]
    every = (list(params), grads, list(exp_avgs), list(exp_avg_sqs), list(averages))
    options = zip(*((g.tensors, *g.betas, g.eps, g.weight_decay) for g in groups), strict=True)
    torch.ops.gdd_fast.adam_ema_(*every, step, skipped, lr, average_weight, *map(list, options), implementation)


def _dense(p: Tensor) -> bool:
    if p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)):
        return True  # the usual cases, checked without making a tensor
    return torch.empty_like(p, device="meta").stride() == p.stride()


def _same_memory(t: Tensor, p: Tensor) -> bool:
    """Whether two tensors of one shape have the same memory layout, ignoring strides of dimensions of size 1."""
    if t.stride() == p.stride():
        return True
    return all(n < 2 or a == b for n, a, b in zip(p.shape, t.stride(), p.stride(), strict=True))


def _laid_out_like(g: Tensor, p: Tensor) -> Tensor:
    """A gradient with its parameter's strides, copied only if its memory is laid out otherwise."""
    if g.stride() == p.stride():
        return g
    if _same_memory(g, p):  # PyTorch's foreach functions are fast only if strides are equal
        return g.as_strided(p.shape, p.stride())
    return torch.empty_like(p).copy_(g)


def _check_like(name: str, t: Tensor, p: Tensor) -> None:
    if p.dtype != torch.float32 or t.dtype != torch.float32 or t.shape != p.shape or t.device != p.device:
        raise InputError(
            f"adam_ema_: {name} must be float32 like their float32 parameters, not {t.dtype} "
            f"{tuple(t.shape)} on {t.device} for {p.dtype} {tuple(p.shape)} on {p.device}"
        )
    if name != "grads" and not _same_memory(t, p):
        raise InputError(
            f"adam_ema_: {name} must lie in memory as the parameters do, but strides are {t.stride()} and {p.stride()}"
        )


torch.library.define(
    "gdd_fast::adam_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] averages, "
    "Tensor(e!) step, Tensor(f!) skipped, Tensor lr, Tensor average_weight, int[] tensors, "
    "float[] beta1, float[] beta2, float[] eps, float[] weight_decay, str implementation) -> ()",
)


@torch.library.impl("gdd_fast::adam_ema_", "CompositeExplicitAutograd")
def _adam_ema_(params: list[Tensor], *arguments) -> None:
    *given, implementation = arguments
    if implementation == "torch":
        *lists, tensors, beta1, beta2, eps, weight_decay = given
        options = zip(tensors, zip(beta1, beta2, strict=True), eps, weight_decay, strict=True)
        run = adam_ema_ref_ if params[0].device.type == "cpu" else adam_ema_waitless_
        run(params, *lists, [Group(*values) for values in options])  # type: ignore[call-arg]
    else:
        torch.ops.gdd_fast_C.adam_ema_(params, *given)
        # The extension writes through pointers, but autograd and others detect changes of tensors by their version.
        _, exp_avgs, exp_avg_sqs, averages, step, skipped, *_ = given
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *averages, step, skipped])


@torch.library.register_fake("gdd_fast::adam_ema_")
def _(*arguments) -> None:
    return None
