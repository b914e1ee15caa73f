"""Optimizer and moving average in one: the generator's step of GDD, on the parameters that GDD and GDD-I train.

The settings of the public code replace what is not finite one gradient after the other, leave Adam at its defaults
(foreach on a GPU, which is taken on a CPU too) and average one parameter after the other; stock is PyTorch's fused Adam
between foreach operations. All start from one state; the state after the first step is compared.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.layer_calls import build
from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import Accuracy
from benchmarks.harness.operator_case import fused_peers, split_missing
from benchmarks.harness.timing import Call
from benchmarks.peers import networks as peers
from gdd_fast.distill.freeze import freeze
from gdd_fast.ops.adam_ema import OPERATOR, adam_ema_

LR, BETAS, EPS, WEIGHT = 1e-4, (0.0, 0.99), 1e-8, 1e-3
_TENSORS_TOUCHED = 9  # p, m, v, average: read and written; the gradient: read


def adam_cases() -> list[Case]:
    """The parameters of NCSN++ 32 that GDD-I trains, 8.8 M, and all 56.4 M, as GDD trains them."""
    group, build = "adam and average", (partial(_bench, 1), partial(_bench, 0))
    return [Case(group, "ncsnpp-32 GDD-I", build[0]), Case(group, "ncsnpp-32 GDD", build[1], larger=True)]


def _bench(level: int, device: torch.device) -> Bench:
    net = build("ncsnpp-32")
    freeze(net, level)
    shapes = [p.shape for p in net.parameters() if p.requires_grad]
    start = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device) * 1e-2 for shape in shapes]

    def after_one_step(dtype: torch.dtype) -> list[Tensor]:
        params = [p.to(dtype, copy=True) for p in start]
        averages = [p.clone() for p in params]
        _foreach_step(params, averages, [g.to(dtype) for g in grads])()
        return params + averages

    accuracy = Accuracy(after_one_step(torch.float64), after_one_step(torch.float32))

    def peer(make: Callable[[list[Tensor], list[Tensor], list[Tensor]], Call]) -> Call:
        params = [p.clone() for p in start]
        averages = [p.clone() for p in params]
        step, first = make(params, averages, grads), [True]

        def call() -> list[Tensor] | None:
            step()
            compared = first.pop() if first else False  # only the first step starts where the definition did
            return params + averages if compared else None

        return call

    def check(outputs: list[Tensor] | None) -> None:
        if outputs is not None:
            accuracy.check(outputs)

    makers = {"official": _loop_step, "stock": _fused_step}
    fused, missing = split_missing(fused_peers(OPERATOR, device, _our_step))
    makers |= fused
    count = sum(p.numel() for p in start)
    prepared = {name: partial(peer, make) for name, make in makers.items()}
    return Bench(prepared, check, bytes=4 * count * _TENSORS_TOUCHED, headline="device", missing=missing)


def _loop_step(params: list[Tensor], averages: list[Tensor], grads: list[Tensor]) -> Call:
    optimizer = torch.optim.Adam(params, lr=LR, betas=BETAS, eps=EPS, foreach=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    @torch.no_grad()
    def step() -> None:
        for g in grads:
            torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g)
        optimizer.step()
        for a, p in zip(averages, params, strict=True):
            a.copy_(p.lerp(a, 1 - WEIGHT))

    return step


def _fused_step(params: list[Tensor], averages: list[Tensor], grads: list[Tensor]) -> Call:
    optimizer = torch.optim.Adam(params, lr=LR, betas=BETAS, eps=EPS, fused=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    @torch.no_grad()
    def step() -> None:
        peers.step_if_finite(optimizer, grads)
        torch._foreach_lerp_(averages, params, WEIGHT)

    return step


def _foreach_step(params: list[Tensor], averages: list[Tensor], grads: list[Tensor]) -> Call:
    optimizer = torch.optim.Adam(params, lr=LR, betas=BETAS, eps=EPS, foreach=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, params, WEIGHT)

    return step


def _our_step(params: list[Tensor], averages: list[Tensor], grads: list[Tensor], *, backend: str) -> Call:
    device = params[0].device
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    count = torch.zeros((), dtype=torch.float32, device=device)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    lr, weight = (torch.full((), value, dtype=torch.float64, device=device) for value in (LR, WEIGHT))

    @torch.no_grad()
    def step() -> None:
        lists = (params, grads, *moments, count, skipped, lr)
        options = {"betas": BETAS, "eps": EPS, "backend": backend}
        adam_ema_(*lists, averages=averages, average_weight=weight, **options)

    return step
