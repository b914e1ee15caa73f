"""Optimizer and moving average in one: the generator's step of GDD, on the parameters that GDD and GDD-I train.

The peers are those of training (peers/training.py). All start from one state; the state after the first step is
compared.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.layer_calls import build
from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import Accuracy
from benchmarks.harness.operator_case import fused_peers
from benchmarks.harness.timing import Call
from benchmarks.peers.training import AVERAGE_WEIGHT, optimizer_step
from gdd_fast.distill.freeze import freeze
from gdd_fast.ops.adam_ema import OPERATOR

LR = 1e-4
_TENSORS_TOUCHED = 9  # p, m, v, average: read and written; the gradient: read


def adam_cases() -> list[Case]:
    """The parameters of NCSN++ 32 that GDD-I trains, 8.8 M, and all 56.4 M, as GDD trains them."""
    group, build = "adam and average", (partial(_bench, 1), partial(_bench, 0))
    return [Case(group, "ncsnpp-32 GDD-I", build[0]), Case(group, "ncsnpp-32 GDD", build[1], larger=True)]


def _bench(level: int, device: torch.device) -> Bench:
    net = build("ncsnpp-32")
    freeze(net, level)
    start = [torch.randn(p.shape, device=device) for p in net.parameters() if p.requires_grad]
    grads = [torch.randn_like(p) * 1e-2 for p in start]

    def peer(make: Callable[..., Call], dtype: torch.dtype = torch.float32) -> Call:
        """The first call returns the state behind its step, where all stand alike; later ones return nothing."""
        weights = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
        averages = [w.detach().clone() for w in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.to(dtype)
        step, first = make(weights, averages), [True]

        def call() -> list[Tensor] | None:
            step()
            return [w.detach() for w in weights] + averages if first and first.pop() else None

        return call

    accuracy = Accuracy(*(peer(_definition, dtype)() for dtype in (torch.float64, torch.float32)))

    def check(outputs: list[Tensor] | None) -> None:
        if outputs is not None:
            accuracy.check(outputs)

    def optimizer(kind: str, weights: list[torch.nn.Parameter], averages: list[Tensor], backend: str = "auto") -> Call:
        return optimizer_step(kind, weights, averages, LR, backend=backend)[1]

    fused, missing = fused_peers(OPERATOR, device, partial(optimizer, "adam_ema"))
    makers = {"official": partial(optimizer, "loop"), "stock": partial(optimizer, "fused"), **fused}
    peers = {name: partial(peer, make) for name, make in makers.items()}
    size = 4 * _TENSORS_TOUCHED * sum(p.numel() for p in start)
    return Bench(peers, check, bytes=size, headline="device", missing=missing)


def _definition(weights: list[torch.nn.Parameter], averages: list[Tensor]) -> Call:
    adam = torch.optim.Adam(weights, lr=LR, betas=(0.0, 0.99), eps=1e-8, foreach=True)

    @torch.no_grad()
    def step() -> None:
        adam.step()
        torch._foreach_lerp_(averages, weights, AVERAGE_WEIGHT)

    return step
