"""The Frechet distance as a loss: against the metric, against autograd, and downhill."""

import pytest
import torch

from gdd_fast.distill.frechet_loss import FrechetLoss
from gdd_fast.errors import ConfigError
from gdd_fast.metrics.features import PixelFeatures, build_extractor
from gdd_fast.metrics.frechet import Statistics, frechet_distance

F, POPULATION = 6, 50


def normal(count, seed, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(F, F, generator=random, dtype=torch.float64)
    return (torch.randn(count, F, generator=random, dtype=torch.float64) @ mix * scale + 0.3 * seed).float()


def statistics(rows):
    found = Statistics(F)
    found.update(rows)
    return found


@pytest.fixture
def data():
    return statistics(normal(200, 1))


@pytest.fixture
def loss(data):
    loss = FrechetLoss(PixelFeatures(), data, POPULATION)
    loss.fill(normal(POPULATION, 2))
    return loss


def by_autograd(rows, data):
    """|mu - m|^2 + tr(S + R - 2 (S R)^(1/2)), the trace by the eigenvalues of the product itself."""
    mu, covariance = rows.mean(0), rows.T.cov()
    values = torch.linalg.eigvals(covariance @ data.covariance).real
    return (mu - data.mean).square().sum() + covariance.trace() + data.covariance.trace() - 2 * values.sqrt().sum()


def test_the_distance_is_the_metrics(loss, data):
    loss.refresh()
    assert float(loss.distance) == pytest.approx(frechet_distance(statistics(normal(POPULATION, 2)), data), rel=1e-9)
    value = loss(normal(3, 4))
    torch.testing.assert_close(value, torch.full((3,), float(loss.distance / data.covariance.trace())))


def test_the_gradient_is_that_of_the_distance_in_images_of_the_population(loss, data):
    loss.refresh()
    rows = normal(POPULATION, 2).double().requires_grad_()
    (expected,) = torch.autograd.grad(by_autograd(rows, data), rows)
    batch = rows.detach()[:8].float().requires_grad_()
    (found,) = torch.autograd.grad(loss(batch).sum(), batch)
    # what remains is the N - 1 of a covariance beside the N of the gradient's mean
    expected = expected[:8] * POPULATION / data.covariance.trace()
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.03 * float(expected.abs().max()))
    away = torch.nn.functional.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0)
    assert away > 0.9995


def test_the_latest_images_are_the_population(loss, data):
    everything = torch.cat([normal(POPULATION, 2), *(normal(7, seed) for seed in range(3, 20))])
    for part in everything[POPULATION:].split(7):
        loss.add(part)
    loss.refresh()
    latest = statistics(everything[-POPULATION:])
    assert float(loss.distance) == pytest.approx(frechet_distance(latest, data), rel=1e-8)
    loss.add(everything[: POPULATION + 20])
    loss.refresh()
    latest = statistics(everything[20 : POPULATION + 20])
    assert float(loss.distance) == pytest.approx(frechet_distance(latest, data), rel=1e-8)


def test_following_the_gradient_ends_at_the_data(data):
    """A linear generator, 64 images at once, statistics of 400."""
    random = torch.Generator().manual_seed(5)
    weight, bias = torch.eye(F).requires_grad_(), torch.zeros(F).requires_grad_()
    loss = FrechetLoss(PixelFeatures(), data, 400)

    def generate(count):
        return torch.randn(count, F, generator=random) @ weight + bias

    loss.fill(generate(400).detach())
    optimizer = torch.optim.Adam([weight, bias], 0.03)
    distances = []
    for _ in range(300):
        loss.refresh()
        distances.append(float(loss.distance))
        batch = generate(64)
        loss(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.add(batch.detach())
    assert min(distances[-20:]) < 0.05 * distances[0]


def test_a_population_without_a_covariance_is_refused(data):
    with pytest.raises(ConfigError, match="has 6 features, and their covariance"):
        FrechetLoss(PixelFeatures(), data, 6)


@pytest.mark.parametrize("name", ["pixels", "lite0"])
def test_features_are_differentiable_and_those_of_the_metric(name, data):
    extractor = build_extractor(name, resolution=32)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=random, dtype=torch.uint8)
    x = (images.float() / 127.5 - 1).requires_grad_()
    loss = FrechetLoss.features_of
    stand_in = type("", (), {"extractors": (extractor,)})()
    found = loss(stand_in, x)
    torch.testing.assert_close(found, extractor(images), rtol=1e-4, atol=1e-4)
    weights = torch.randn(found.shape, generator=random)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    along = gradient / gradient.norm()
    with torch.no_grad():
        step = 1e-2
        change = sum(sign * (loss(stand_in, x + sign * step * along) * weights).double().sum() for sign in (1, -1)) / (
            2 * step
        )
    assert float(change) == pytest.approx(float(gradient.norm()), rel=0.03)
