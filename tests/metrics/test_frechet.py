"""Statistics in a stream, and the Frechet distance against scipy's matrix square root and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdd_fast.errors import DataError
from gdd_fast.metrics.features import PixelFeatures
from gdd_fast.metrics.frechet import Statistics, frechet_distance
from gdd_fast.metrics.population import Needs, Population, gather
from gdd_fast.ranks import World


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics(features: torch.Tensor, batch: int = 1000, name: str = "") -> Statistics:
    result = Statistics(features.shape[1], name)
    for part in features.split(batch):
        result.update(part)
    return result


def by_definition(a: torch.Tensor, b: torch.Tensor) -> float:
    """The formula as published, with scipy's matrix square root."""
    from scipy.linalg import sqrtm

    (mu1, s1), (mu2, s2) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    return float(np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2))))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2))
def test_any_split_into_batches_gives_numpys_mean_and_covariance(sizes):
    x = normal(sum(sizes), 3) * 5 + 100
    streamed = Statistics(3)
    for part in x.split(sizes):
        streamed.update(part)
    assert streamed.count == len(x)
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_a_mean_far_from_zero_costs_no_digits():
    x = normal(500, 4)
    shifted = statistics(x + 1e8, batch=32)
    np.testing.assert_allclose(shifted.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-6, atol=1e-7)


def _populations(world: World) -> list[Population]:
    """Of 41 images, or of 5, of which the second rank has no batch."""
    images = torch.randint(256, (41, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (41, 5):
        batches = torch.stack(own).split(8) if (own := world.share(list(images[:count]), 8)) else []
        found += gather(batches, [PixelFeatures()], [Needs(rows=True)], world=world, everywhere=True)
    return found


def _rank(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for population in _populations(World(rank, 2, torch.device("cpu"))):
        results.put((population.count, population.rows.tolist(), population.statistics.covariance.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_has_what_one_process_finds(tmp_path):
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
    whole = {
        population.count: (population.rows.tolist(), population.statistics.covariance.tolist())
        for population in _populations(World(0, 1, torch.device("cpu")))
    }
    for _ in range(4):
        count, *found = results.get()
        assert tuple(found) == whole[count]


def test_equal_to_scipy_where_covariances_have_full_rank():
    mixing = normal(24, 24, seed=7)
    a, b = normal(400, 24) @ mixing, normal(300, 24, seed=1) * 1.5 + 0.7
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(by_definition(a, b), rel=1e-6)


@pytest.mark.parametrize("n", [2, 8, 31])
def test_fewer_samples_than_dimensions(n):
    """On a subspace the distance is that of the subspace: rotate full-rank samples into more dimensions."""
    a, b = normal(200, n), normal(150, n, seed=1) * 2 + 1
    basis = torch.linalg.qr(normal(64, n, seed=2))[0].T
    flat = frechet_distance(statistics(a), statistics(b))
    assert frechet_distance(statistics(a @ basis), statistics(b @ basis)) == pytest.approx(flat, rel=1e-6)


def test_closed_forms():
    x = normal(300, 6)
    same = statistics(x)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(same, statistics(x + 2)) == pytest.approx(6 * 4)
    assert frechet_distance(same, statistics(x * 3)) == pytest.approx(
        float((x.mean(0) * 2).square().sum() + 4 * same.covariance.trace())
    )
    constant = statistics(torch.full((5, 6), 0.25))
    expected = float((same.mean - 0.25).square().sum() + same.covariance.trace())
    assert frechet_distance(same, constant) == pytest.approx(expected)
    assert frechet_distance(constant, constant) == 0


def test_symmetric():
    a, b = statistics(normal(50, 8)), statistics(normal(20, 8, seed=1) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad):
    x = normal(4, 3)
    x[2, 1] = bad
    with pytest.raises(DataError, match="NaN"):
        statistics(x)


def test_what_cannot_be_compared():
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(statistics(normal(1, 3)), statistics(normal(5, 3)))
    with pytest.raises(DataError, match="dimensions"):
        frechet_distance(statistics(normal(5, 4)), statistics(normal(5, 3)))
    with pytest.raises(DataError, match="lite0-64"):
        frechet_distance(statistics(normal(5, 3), name="lite0-64"), statistics(normal(5, 3), name="lite0-128"))
    large = statistics(normal(5, 3))
    large.image_shape = (3, 32, 32)
    small = Statistics(3, image_shape=(1, 16, 16))
    small.update(normal(5, 3))
    with pytest.raises(DataError, match="images"):
        frechet_distance(large, small)
    with pytest.raises(DataError, match="expected features"):
        statistics(normal(5, 3)).update(normal(5, 4))
