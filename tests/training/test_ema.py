"""The moving average: half-life in images, ramp-up, and what is frozen."""

import pytest
import torch
from torch import nn

from gdd_fast.training.ema import Ema
from gdd_fast.training.optimizer import make_adam


def network():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].bias.requires_grad_(False)
    return net


def update(net, ema, images, batch):
    """A step of a training loop, at a learning rate that leaves the weights as they are."""
    optimizer = make_adam(net.parameters(), 0.0, averages=ema.averages)
    optimizer.average_weight.fill_(1 - ema.decay(images, batch))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_an_old_weight_counts_half_after_the_half_life():
    net = network()
    ema = Ema(net, halflife=640, rampup=0)
    first = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    for step in range(10):
        update(net, ema, step * 64, 64)
    torch.testing.assert_close(ema.net[0].weight, first + 0.5)


@pytest.mark.parametrize(
    ("images", "halflife"), [(64, 3.2), (2000, 100), (500_000, 25_000), (10_000_000, 500_000), (10**9, 500_000)]
)
def test_the_half_life_is_a_twentieth_of_the_images_seen(images, halflife):
    ema = Ema(network(), halflife=500_000, rampup=0.05)
    assert ema.decay(images, 256) == pytest.approx(0.5 ** (256 / halflife))


def test_the_first_update_of_a_ramped_average_is_a_copy():
    net = network()
    ema = Ema(net, halflife=500_000, rampup=0.05)
    with torch.no_grad():
        net[0].weight.add_(1)
    update(net, ema, 0, 256)
    assert torch.equal(ema.net[0].weight, net[0].weight)


def test_the_average_is_a_network_of_its_own():
    net = network()
    ema = Ema(net, halflife=100, rampup=0)
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    with torch.no_grad():
        net[0].bias.add_(1)  # frozen: nothing trains it, so nothing averages it
    update(net, ema, 100, 100)
    assert not torch.equal(ema.net[0].bias, net[0].bias)
    assert net.training and net[0].weight.requires_grad
