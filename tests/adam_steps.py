"""Steps of Adam with a moving average, by torch.optim and by ours, from the same parameters and gradients."""

import pytest
import torch
from torch import nn

from gdd_fast.ops.adam_ema import OPERATOR
from parity import backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
# one number; less than a vector; more than one chunk of the fused implementations, with a remainder; nothing
SHAPES = [(), (3,), (5, 7), (4, 3, 3, 3), (33000,), (0, 4)]


def parameters(backend, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    return [nn.Parameter(t.to(device_for(backend), dtype)) for t in tensors]


def set_gradients(params, step, bad=None):
    """The same numbers for every copy of the parameters; `bad` goes into the last number of the largest."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10 ** (step % 3 - 2)
        p.grad = grad.to(p.device, p.dtype)  # contiguous, also for a channels_last parameter
    if bad is not None:
        params[4].grad[-1] = bad


def averages_of(params):
    return {p: p.detach().clone() for p in params}


def torch_steps(params, averages, steps, decay, bad_steps=(), **options):
    """What a training loop without this operator does."""
    optimizer = torch.optim.Adam(params, **options)
    for step in range(steps):
        if step in bad_steps:
            continue
        set_gradients(params, step)
        optimizer.step()
        with torch.no_grad():
            for p, average in averages.items():
                average.lerp_(p, 1 - decay)
    return optimizer


def fused_steps(optimizer, params, steps, decay, bad_steps=(), bad=float("nan"), first=0):
    optimizer.average_weight.fill_(1 - decay)
    for step in range(first, first + steps):
        set_gradients(params, step, bad if step in bad_steps else None)
        before = int(optimizer.skipped)
        optimizer.step()
        assert int(optimizer.skipped) - before == (step in bad_steps)


def assert_close(got, want, **tolerances):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def in_groups(params):
    """Groups with learning rates, moments and weight decay of their own; one has no gradients."""
    idle = nn.Parameter(torch.zeros(2, device=params[0].device))
    return [
        {"params": params[:2], "lr": 1e-2},
        {"params": [idle], "lr": 1.0},
        {"params": params[2:], "betas": (0.5, 0.9), "weight_decay": 0.1, "eps": 1e-4},
    ]
