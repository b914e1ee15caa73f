"""Gradients in one buffer: where each lies, what becomes of it between the ranks, and whose it is not."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gdd_fast.ranks import World
from gdd_fast.training.exchange import GradientExchange
from gdd_fast.training.optimizer import StepGuard, make_adam

TWO = World(0, 2, torch.device("cpu"))


@pytest.fixture
def other_rank(monkeypatch):
    """The other of two ranks has three times our gradients."""
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(4))


def parameters():
    shapes = (3,), (2, 5), (4, 3, 3, 3), ()
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    weights[2].data = weights[2].data.contiguous(memory_format=torch.channels_last)
    return weights


def test_every_gradient_comes_back_as_the_mean(other_rank):
    weights = parameters()
    exchange = GradientExchange(weights, TWO)
    places = None
    for _ in range(2):
        given = [torch.randn(w.shape) for w in weights]
        for w, g in zip(weights, given, strict=True):
            w.grad = g.clone()
        exchange.pack()
        assert all(w.grad is None for w in weights)
        exchange.average()
        exchange.unpack()
        for w, g in zip(weights, given, strict=True):
            torch.testing.assert_close(w.grad, 2 * g, rtol=0, atol=0)
            assert w.grad.stride() == w.stride() and w.grad.data_ptr() % 16 == 0
        held = [w.grad.data_ptr() for w in weights]
        assert places in (None, held), "a captured step reads and writes where it was captured"
        places = held


def test_parameters_without_gradients_are_left_without(other_rank):
    weights = parameters()
    exchange = GradientExchange(weights, TWO)
    for trained in (weights, weights[:2], weights[1:]):
        for w in trained:
            w.grad = torch.ones_like(w)
        exchange.pack()
        exchange.average()
        exchange.unpack()
        for w in weights:
            expected = any(w is t for t in trained)
            assert (w.grad is not None) == expected and (not expected or w.grad.eq(2).all())
            w.grad = None
    nothing = GradientExchange([], TWO)
    nothing.pack()
    nothing.average()
    nothing.unpack()


@pytest.mark.parametrize("nonfinite", ["skip", "replace"])
def test_a_gradient_that_one_rank_alone_has_infinite(other_rank, nonfinite):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    guard = StepGuard("generator", make_adam(weights, 0.1), TWO, 3, nonfinite)
    for w in weights:
        w.grad = torch.full_like(w, 2.0)
    weights[0].grad[1] = torch.inf
    guard.step()
    assert all(w.grad is None for w in weights)
    taken = nonfinite == "replace"
    assert (guard.skipped, guard.skipped_in_row) == (0 if taken else 1,) * 2
    assert all(torch.equal(w, torch.ones_like(w)) for w in weights) != taken
