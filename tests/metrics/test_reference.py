"""Statistics of real images: this library's files and other projects', and what is no statistics."""

import pickle

import numpy as np
import pytest
import torch

from gdd_fast.errors import DataError
from gdd_fast.metrics.frechet import Statistics, frechet_distance
from gdd_fast.metrics.population import Needs, Population
from gdd_fast.metrics.reference import choose_reference, load_references, save_reference


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def population(features: torch.Tensor, name: str = "lite0-64", shape=(3, 32, 32)) -> Population:
    found = Population(name, shape, Statistics(features.shape[1], name, image_shape=shape), features[:0])
    found.update(features)
    found.finish()
    return found


@pytest.fixture
def original():
    return population(normal(30, 5))


def moments(original: Population) -> dict[str, np.ndarray]:
    return {"mu": original.statistics.mean.numpy(), "sigma": original.statistics.covariance.numpy()}


def same(loaded: Population, original: Population) -> bool:
    return frechet_distance(loaded.statistics, original.statistics) == pytest.approx(0, abs=1e-12)


def test_save_and_load(original, tmp_path):
    save_reference(original, tmp_path / "ref.npz")
    (loaded,) = load_references(tmp_path / "ref.npz")
    assert (loaded.count, loaded.features, loaded.image_shape) == (30, "lite0-64", (3, 32, 32))
    assert loaded.rows is None
    assert same(loaded, original)
    loaded.statistics.update(normal(10, 5, seed=1))
    both = population(torch.cat([normal(30, 5), normal(10, 5, seed=1)])).statistics
    torch.testing.assert_close(loaded.statistics.covariance, both.covariance)


def test_the_features_too_if_asked(original, tmp_path):
    save_reference(original, tmp_path / "ref.npz", rows=True)
    (loaded,) = load_references(tmp_path / "ref.npz")
    assert torch.equal(loaded.rows, original.rows)


def test_edms_and_clean_fids_files(original, tmp_path):
    np.savez(tmp_path / "edm.npz", mu=moments(original)["mu"].astype(">f8"), sigma=moments(original)["sigma"])
    np.savez_compressed(tmp_path / "clean.NPZ", **moments(original))
    (tmp_path / "clean.NPZ.npz").rename(tmp_path / "clean.NPZ")
    for name in ("edm.npz", "clean.NPZ"):
        (loaded,) = load_references(tmp_path / name)
        assert loaded.statistics.count is None and loaded.image_shape is None and loaded.features == ""
        assert same(loaded, original)
        with pytest.raises(DataError, match="count"):
            loaded.statistics.update(normal(3, 5).double())


def test_edm2s_pickle_has_a_set_for_each_network(original, tmp_path):
    other = population(normal(40, 7, seed=3))
    content = {"fid": moments(original), "fd_dinov2": moments(other)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content, 4))
    by_name = {found.features: found for found in load_references(tmp_path / "ref.pkl")}
    assert by_name.keys() == {"inception", "dinov2-224"}
    by_name["inception"].statistics.features = by_name["dinov2-224"].statistics.features = ""
    assert same(by_name["inception"], original)
    assert same(by_name["dinov2-224"], other)


def test_a_pickle_runs_nothing(tmp_path, canary):
    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"fid": {"mu": Attack(), "sigma": np.eye(3)}}))
    with pytest.raises(DataError, match=r"ref\.pkl"):
        load_references(tmp_path / "ref.pkl")


def test_torch_fidelitys_cache(original, tmp_path):
    torch.save(moments(original), tmp_path / "cifar10-stat-fid-2048.pt")
    (loaded,) = load_references(tmp_path / "cifar10-stat-fid-2048.pt")
    assert same(loaded, original)


def test_features_alone_as_clean_fid_and_torch_fidelity_keep_them(original, tmp_path):
    np.savez_compressed(tmp_path / "cifar10_kid.npz", feats=original.rows.numpy())
    torch.save(original.rows, tmp_path / "cifar10-features-2048.pt")
    for name in ("cifar10_kid.npz", "cifar10-features-2048.pt"):
        (loaded,) = load_references(tmp_path / name)
        assert torch.equal(loaded.rows, original.rows) and loaded.count == loaded.statistics.count == 30
        assert same(loaded, original) and loaded.features == ""


def test_files_that_are_no_statistics(tmp_path):
    eye = np.eye(3)
    np.savez(tmp_path / "other.npz", images=eye)
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2), sigma=eye)
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=eye * np.nan)
    np.savez(tmp_path / "pickle.npz", mu=np.array([None]), sigma=eye)
    np.savez(tmp_path / "words.npz", mu=np.array(["a", "b", "c"]), sigma=eye)
    np.savez(tmp_path / "counts.npz", mu=np.zeros(3), sigma=eye, n=[1, 2])
    np.savez(tmp_path / "alone.npz", mu=np.zeros(3), sigma=eye, n=1)
    np.savez(tmp_path / "form.npz", mu=np.zeros(3), sigma=eye, n=5, image_shape="3x32x32")
    np.savez(tmp_path / "feats.npz", mu=np.zeros(3), sigma=eye, feats=np.zeros((4, 2)))
    np.savez(tmp_path / "onerow.npz", feats=np.zeros((1, 3)))
    np.savez(tmp_path / "nanrows.npz", feats=np.full((4, 3), np.nan))
    torch.save(torch.zeros(3), tmp_path / "vector.pt")
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "text.pkl").write_text("not a pickle")
    torch.save([1, 2], tmp_path / "list.pt")
    names = [
        "missing",
        "other",
        "shape",
        "nan",
        "pickle",
        "words",
        "counts",
        "alone",
        "form",
        "feats",
        "text",
        "onerow",
        "nanrows",
    ]
    for name in [*(f"{name}.npz" for name in names), "text.pkl", "list.pt", "vector.pt"]:
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            load_references(tmp_path / name)


def bad_sigmas() -> dict[str, np.ndarray]:
    good = np.cov(np.random.default_rng(0).normal(size=(200, 6)), rowvar=False)
    values, vectors = np.linalg.eigh(good)
    values[0] = -1e-3 * values[-1]
    return {
        "not symmetric": np.random.default_rng(0).normal(size=(6, 6)),
        "transposed in one place": good + np.diag([1e-3, 0, 0, 0, 0], k=1),
        "negative": -np.eye(6),
        "one negative eigenvalue": (vectors * values) @ vectors.T,
    }


@pytest.mark.parametrize("kind", bad_sigmas())
def test_a_sigma_that_is_no_covariance_is_refused(kind, tmp_path):
    """The distance to one could be anything, 0 among it."""
    np.savez(tmp_path / "bad.npz", mu=np.zeros(6), sigma=bad_sigmas()[kind])
    with pytest.raises(DataError, match=r"bad\.npz: sigma .* not a covariance"):
        load_references(tmp_path / "bad.npz")


def test_singular_and_rounded_covariances_are_covariances(tmp_path):
    few = population(normal(4, 40))  # rank 3
    for kind in (np.float32, np.float64):
        np.savez(tmp_path / "few.npz", mu=np.zeros(40, kind), sigma=moments(few)["sigma"].astype(kind))
        load_references(tmp_path / "few.npz")
    np.savez(tmp_path / "zero.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    load_references(tmp_path / "zero.npz")


def test_choosing_by_network_dimensions_and_size(original, tmp_path):
    unnamed = population(normal(30, 5, seed=2), name="", shape=None)
    files = [(tmp_path / "a", unnamed), (tmp_path / "b", original)]
    shape, needs = (3, 32, 32), Needs()
    assert choose_reference(files, "lite0-64", 5, shape, needs) is original
    assert choose_reference(files, "inception", 5, shape, needs) is unnamed
    assert choose_reference(files, "inception", 2048, shape, needs) is None
    assert choose_reference(files[:0], "inception", 5, shape, needs) is None
    without = [(tmp_path / "c", Population("lite0-64", None, original.statistics))]
    assert choose_reference(without, "lite0-64", 5, shape, Needs(rows=True)) is None
    with pytest.raises(DataError, match="has 6"):
        choose_reference(files, "lite0-64", 6, shape, needs)
    with pytest.raises(DataError, match=r"3 x 32\^2"):
        choose_reference(files, "lite0-64", 5, (3, 64, 64), needs)
