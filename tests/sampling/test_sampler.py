"""Samplers against a denoiser whose ODE has a solution in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.sampling.generate import SamplerConfig, generate
from gdd_fast.sampling.sampler import heun, noise_levels, one_step
from gdd_fast.sampling.seeds import SeedStreams, latents

MEAN, STD = 0.3, 0.5


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data distributed as N(MEAN, STD^2) in every pixel; counts its evaluations."""

    img_resolution, img_channels, label_dim = 4, 3, 0
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN, dtype=torch.float64))
        self.levels: list[float] = []

    def forward(self, x, sigma, class_labels=None):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        self.levels.append(float(sigma[0]))
        s2 = sigma.square()[:, None, None, None]
        return (STD**2 * x + s2 * self.mean.to(x.dtype)) / (STD**2 + s2)


def solution(z: torch.Tensor, sigma_max: float = 80.0) -> torch.Tensor:
    """Where the ODE `dx = (x - D(x; s)) / s ds` takes x = sigma_max * z at s = 0."""
    return MEAN + (sigma_max * z - MEAN) * STD / math.sqrt(STD**2 + sigma_max**2)


@pytest.fixture
def net():
    return GaussianDenoiser()


@pytest.fixture
def z():
    return latents(range(64), (3, 4, 4))[0].double()


@torch.no_grad()
def test_heun_converges_to_the_solution_with_second_order(net, z):
    errors = [
        float((heun(net, z, steps=steps, sigma_min=1e-4) - solution(z)).abs().max()) for steps in (20, 40, 80, 160)
    ]
    assert errors[-1] < 2e-3
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 4.6


@torch.no_grad()
def test_one_step_of_heun_is_one_step(net, z):
    torch.testing.assert_close(heun(net, z, steps=1), one_step(net, z))


@torch.no_grad()
def test_heun_evaluates_each_level_twice_but_the_first(net, z):
    heun(net, z, steps=5)
    assert len(net.levels) == 2 * 5 - 1
    levels = noise_levels(5)
    visited = [levels[0]] + [level for level in levels[1:-1] for _ in range(2)]
    assert net.levels == pytest.approx(visited)


def test_noise_levels_follow_equation_5():
    levels = noise_levels(18, 0.002, 80, 7)
    assert len(levels) == 19
    assert levels[0] == pytest.approx(80)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0
    roots = [level ** (1 / 7) for level in levels[:-1]]
    steps = [a - b for a, b in pairwise(roots)]
    assert steps == pytest.approx([steps[0]] * 17)


@torch.no_grad()
def test_levels_stay_in_the_networks_range(net, z):
    net.sigma_min, net.sigma_max = 0.02, 10.0
    heun(net, z, steps=4)
    assert max(net.levels) == pytest.approx(10)
    assert min(net.levels) == pytest.approx(0.02)


@torch.no_grad()
def test_stochastic_sampling_keeps_the_distribution_and_leaves_the_path(net):
    seeds = range(512)
    streams = SeedStreams(seeds)
    z, _ = streams.start((3, 4, 4))
    x = heun(net, z, steps=64, s_churn=40, s_min=0.05, s_max=50, noise=streams.normal_like)
    assert (x - heun(net, z, steps=64)).abs().mean() > 0.1
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, rel=0.02)


@torch.no_grad()
def test_stochastic_images_depend_on_the_seed_alone(net):
    sampler = SamplerConfig(sampler="heun", steps=6, s_churn=3)
    together = torch.cat([part.images for part in generate(net, [3, 1, 2], sampler, batch=3)])
    alone = torch.cat([part.images for part in generate(net, [3, 1, 2], sampler, batch=1)])
    assert torch.equal(together, alone)


def test_one_step_is_the_denoiser_at_sigma_80(net, z):
    x = one_step(net, z)
    assert net.levels == [80.0]
    torch.testing.assert_close(x, net(80 * z, torch.full((len(z),), 80.0, dtype=z.dtype)))
    assert x.requires_grad, "training differentiates through it"


@torch.no_grad()
def test_results_have_the_dtype_of_the_latents(net, z):
    assert heun(net, z.float(), steps=3).dtype == one_step(net, z.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"sigma_min": 0.0},
        {"sigma_min": 3.0, "sigma_max": 2.0},
        {"sigma_max": math.inf},
        {"rho": 0.0},
        {"s_churn": -1.0},
        {"sampler": "euler"},
    ],
)
def test_settings_that_cannot_work(options):
    with pytest.raises(ConfigError):
        SamplerConfig(**options).validate()


def test_generate_checks_before_it_computes(net):
    for options in ({"batch": 0}, {"class_index": 1}, {"sampler": SamplerConfig(steps=0)}):
        with pytest.raises(ConfigError):
            generate(net, [0], **options)
    assert net.levels == []


def test_generate_gives_every_seed_once_in_order(net):
    parts = list(generate(net, [9, 4, 7, 2, 0], batch=2))
    assert [part.seeds for part in parts] == [[9, 4], [7, 2], [0]]
    assert [tuple(part.images.shape) for part in parts] == [(2, 4, 4, 3), (2, 4, 4, 3), (1, 4, 4, 3)]
    assert all(part.images.dtype == torch.uint8 and part.classes is None for part in parts)
    z, _ = latents([7], (3, 4, 4))
    expected = (one_step(net, z) * 127.5 + 128).clip(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
    assert torch.equal(parts[1].images[0], expected)


def test_a_broken_network_makes_no_black_images(net):
    with torch.no_grad():
        net.mean.fill_(math.nan)
    with pytest.raises(WeightsError, match="NaN"):
        list(generate(net, [0, 1]))
