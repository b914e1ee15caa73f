"""Learning rates that fall: their formula, and that steps are taken at them."""

import pytest
import torch

from gdd_fast.training.optimizer import make_adam
from gdd_fast.training.rates import RateDecay


def weights():
    return [torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(("images", "factor"), [(0, 1.0), (4_999, 1.0), (5_000, 1.0), (20_000, 0.5), (500_000, 0.1)])
def test_inverse_square_root_beyond_the_reference(images, factor):
    one, other = make_adam(weights(), 1e-3), make_adam(weights(), 3e-4, lazy_interval=16)
    before = [one.param_groups[0]["lr"], other.param_groups[0]["lr"]]
    rates = RateDecay(one, other, reference=5_000)
    for earlier in (700_000, images):  # what was set before does not count
        rates.set(earlier)
    after = [one.param_groups[0]["lr"], other.param_groups[0]["lr"]]
    assert after == pytest.approx([rate * factor for rate in before], rel=1e-12)


def test_rates_without_a_reference_stay():
    adam = make_adam(weights(), 1e-3)
    RateDecay(adam, reference=0).set(10**9)
    assert adam.param_groups[0]["lr"] == 1e-3


def test_steps_are_as_long_as_the_rate_says():
    params = weights()
    adam = make_adam(params, 1e-3)
    rates = RateDecay(adam, reference=1_000)
    moved = []
    for images in (0, 4_000):
        before = params[0].detach().clone()
        rates.set(images)
        params[0].grad = torch.ones(3)
        adam.step()
        moved.append((before - params[0].detach()).mean().item())
    # without momentum and with equal gradients, Adam moves by the rate itself
    assert moved == pytest.approx([1e-3, 5e-4], rel=1e-3)
