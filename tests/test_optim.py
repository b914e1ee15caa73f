"""Adam with the lazy-regularisation correction, and steps that are skipped and not scrubbed."""

import pytest
import torch
from tiny_run import ALONE
from torch import nn

from gdd_fast.distill.optim import StepGuard, make_adam
from gdd_fast.errors import DivergedError


def test_the_lazy_correction():
    group = make_adam([nn.Parameter(torch.ones(2))], 1e-3, lazy_interval=16).param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * 16 / 17, rel=1e-12)
    assert group["betas"] == (0, pytest.approx(0.99 ** (16 / 17), rel=1e-12))
    assert group["eps"] == 1e-8
    plain = make_adam([nn.Parameter(torch.ones(2))], 1e-3).param_groups[0]
    assert (plain["lr"], plain["betas"]) == (1e-3, (0, 0.99))


def test_only_what_trains_is_given_to_adam():
    frozen, trained = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    assert make_adam([frozen, trained], 1e-3).param_groups[0]["params"] == [trained]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_are_adams(memory_format):
    """In float64 by hand; channels_last parameters with gradients that were computed in another layout."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=memory_format))
    optimizer = make_adam([weight], 1e-2, lazy_interval=4)
    beta, lr = 0.99 ** (4 / 5), 1e-2 * 4 / 5
    expected, moment = weight.detach().double(), torch.zeros(4, 3, 3, 3, dtype=torch.float64)
    for step in range(1, 4):
        gradient = torch.randn(4, 3, 3, 3)
        (weight * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moment = beta * moment + (1 - beta) * gradient.double() ** 2
        expected -= lr * gradient / ((moment / (1 - beta**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def guarded(limit=3):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    return weights, StepGuard("generator", make_adam(weights, 0.1), ALONE, limit)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    weights, guard = guarded()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[1].grad[0, 1] = bad
    assert guard.step() is False
    assert all(torch.equal(w, torch.ones_like(w)) and w.grad is None for w in weights)
    assert not guard.optimizer.state  # the moments have not seen it either
    assert (guard.skipped, guard.skipped_in_row) == (1, 1)


def test_large_gradients_are_finite():
    weights, guard = guarded()
    for weight in weights:
        weight.grad = torch.full_like(weight, 3e38)
    assert guard.step() is True and guard.skipped == 0


def test_too_many_in_a_row_end_the_run():
    weights, guard = guarded(limit=3)

    def step(value):
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        return guard.step()

    assert [step(x) for x in (float("nan"), float("nan"), 1.0, float("nan"), float("nan"))] == [
        False, False, True, False, False,
    ]  # fmt: skip
    with pytest.raises(DivergedError, match="3 generator steps in a row"):
        step(float("nan"))
    assert guard.skipped == 5
