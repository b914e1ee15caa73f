"""Adam with the lazy-regularisation correction, and steps that are skipped and not scrubbed."""

import pytest
import torch
from tiny_run import ALONE
from torch import nn

from gdd_fast.errors import DivergedError
from gdd_fast.training import checkpoint
from gdd_fast.training.optimizer import StepGuard, make_adam


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
    guard.step()
    assert all(torch.equal(w, torch.ones_like(w)) and w.grad is None for w in weights)
    for state in guard.optimizer.state.values():  # the moments have not seen it either
        assert not any(t.any() for t in state.values())
    assert (guard.skipped, guard.skipped_in_row) == (1, 1)


def test_the_norm_of_a_step_is_that_of_all_its_gradients():
    weights, guard = guarded()
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 4.0)
    assert guard.step().item() == pytest.approx((9 + 64) ** 0.5)


def test_large_gradients_are_finite():
    weights, guard = guarded()
    for weight in weights:
        weight.grad = torch.full_like(weight, 3e38)
    guard.step()
    assert guard.skipped == 0


def test_too_many_in_a_row_end_the_run():
    weights, guard = guarded(limit=3)

    def step(value):
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        guard.step()

    rows = []
    for value in (float("nan"), float("nan"), 1.0, float("nan"), float("nan"), float("nan")):
        step(value)
        rows.append(guard.skipped_in_row)
    assert rows == [1, 2, 0, 1, 2, 3]
    before = [w.detach().clone() for w in weights]
    with pytest.raises(DivergedError, match="3 generator steps in a row"):
        step(1.0)
    assert guard.skipped == 5
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))  # the step after is not taken


def test_counting_needs_no_look_in_between():
    """The count of a step is read when the next is due; skipped steps that nobody asked about are not lost."""
    weights, guard = guarded(limit=2)
    for value in (float("nan"), 1.0, float("nan"), 1.0, 1.0, float("inf"), float("inf")):
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        guard.step()
    with pytest.raises(DivergedError, match="2 generator steps"):
        guard.step()
    assert (guard.skipped, guard.skipped_in_row) == (4, 2)


def test_steps_of_two_kinds_share_an_optimizer_and_are_counted_apart():
    weights, one = guarded(limit=2)
    other = StepGuard("R1", one.optimizer, ALONE, limit=2)
    for number in range(4):
        for guard, value in ((one, 1.0), (other, float("nan") if number % 2 else 1.0)):
            for weight in weights:
                weight.grad = torch.full_like(weight, value)
            guard.step()
    assert (one.skipped, other.skipped) == (0, 2)
    assert float(one.optimizer.state[weights[0]]["step"]) == 6


def test_a_restored_guard_goes_on_counting():
    weights, guard = guarded(limit=2)
    guard.restore(7)
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    guard.step()
    assert (guard.skipped, guard.skipped_in_row) == (8, 1)


def test_a_checkpoint_of_torchs_adam_goes_on(tmp_path):
    """Runs saved when the optimizer was torch.optim.Adam, fused or not, load, and take the same next steps."""
    for fused in (True, False):
        torch.manual_seed(0)
        shapes = [(4, 3, 3, 3), (4,)]
        theirs = [nn.Parameter(torch.randn(s)) for s in shapes]
        theirs[0].data = theirs[0].data.contiguous(memory_format=torch.channels_last)
        adam = torch.optim.Adam(theirs, lr=1e-2, betas=(0.0, 0.99), eps=1e-8, fused=fused)

        def step(params, optimizer, number):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()

        for number in range(3):
            step(theirs, adam, number)
        path = tmp_path / f"{fused}.safetensors"
        checkpoint.save(path, {"o": checkpoint.optimizer_tensors(adam)}, {"o": checkpoint.optimizer_values(adam)})
        ours = [nn.Parameter(p.detach().clone()) for p in theirs]
        optimizer = make_adam(ours, 1e-2)
        checkpoint.load(path).load_optimizer("o", optimizer)
        for number in range(3, 6):
            step(theirs, adam, number)
            step(ours, optimizer, number)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
