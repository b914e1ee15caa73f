"""Finite check, Adam and moving average over the parameters of NCSN++ 32, against two ways to write it in PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cpu_peers import assert_as_accurate, timed
from gdd_fast.distill.adam_ema import AdamEma
from gdd_fast.distill.freeze import freeze
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.precond import EDMPrecond

OPTIONS = {"lr": 1e-4, "betas": (0.0, 0.99), "eps": 1e-8}
DECAY = 0.999
PASSES = 9  # p, m, v, average: read and written; the gradient: read
LEVELS = {"smoke": None, "gdd-i": 1, "gdd": 0}  # what trains of NCSN++ 32, by freeze level


def shapes_of(case: str) -> list[torch.Size]:
    if LEVELS[case] is None:
        return [torch.Size([16, 16, 3, 3]), torch.Size([16])] * 4
    with torch.device("meta"):
        net = EDMPrecond(32, 3, **ncsnpp())
    freeze(net, LEVELS[case])
    return [p.shape for p in net.parameters() if p.requires_grad]


def loops(params: list[nn.Parameter], averages: list[Tensor]) -> Callable[[], None]:
    """The usual loop: gradients scrubbed one by one, foreach Adam, one average after the other."""
    optimizer = torch.optim.Adam(params, foreach=True, **OPTIONS)

    @torch.no_grad()
    def step() -> None:
        for p in params:
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        for p, average in zip(params, averages, strict=True):
            average.copy_(p.lerp(average, DECAY))

    return step


def stock(params: list[nn.Parameter], averages: list[Tensor]) -> Callable[[], None]:
    """The best of PyTorch: a foreach look at the gradients, fused Adam, foreach average."""
    optimizer = torch.optim.Adam(params, fused=True, **OPTIONS)

    @torch.no_grad()
    def step() -> None:
        norms = torch._foreach_norm([p.grad for p in params], ord=float("inf"))
        if torch.stack(norms).isfinite().all():
            optimizer.step()
            torch._foreach_lerp_(averages, params, 1 - DECAY)

    return step


def fused(params: list[nn.Parameter], averages: list[Tensor]) -> Callable[[], None]:
    optimizer = AdamEma(params, averages=dict(zip(params, averages, strict=True)), **OPTIONS)
    optimizer.average_weight.fill_(1 - DECAY)
    return optimizer.step


@pytest.mark.parametrize("peer", [fused, stock, loops], ids=["gdd_fast", "stock", "loops"])
@pytest.mark.parametrize("case", ["smoke", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gdd-i", "gdd"))])
def test_adam_ema(benchmark, case, peer):
    shapes = shapes_of(case)

    def start(make, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], list[Tensor]]:
        random = torch.Generator().manual_seed(0)
        draw = lambda shape: torch.randn(shape, generator=random).to(dtype)
        params = [nn.Parameter(draw(shape)) for shape in shapes]
        for p in params:
            p.grad = draw(p.shape) * 1e-2
        averages = [p.detach().clone() for p in params]
        return make(params, averages), [*(p.detach() for p in params), *averages]

    def check() -> None:
        found = []
        for make, dtype in ((peer, torch.float32), (stock, torch.float32), (loops, torch.float64)):
            step, state = start(make, dtype)
            step(), step()
            found.append([torch.cat([t.flatten() for t in state])])
        assert_as_accurate(*found)

    step, _ = start(peer)
    moved = PASSES * 4 * sum(shape.numel() for shape in shapes)
    timed(benchmark, f"adam_ema {case}", step, check, moved=moved)
