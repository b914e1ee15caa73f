"""What images are described by: shapes, ranges, and the same vector whatever the batch or the storage."""

import pytest
import torch
from torch.nn.functional import interpolate

from gdd_fast.data.demo import demo_dataset
from gdd_fast.errors import ConfigError, DataError, WeightsError
from gdd_fast.metrics.features import PixelFeatures, build_extractor
from gdd_fast.metrics.features.efficientnet_lite import Lite0Features
from gdd_fast.metrics.frechet import frechet_distance
from gdd_fast.metrics.measure import Measurement, parse_metrics
from gdd_fast.metrics.population import dataset_populations, gather
from gdd_fast.models.backbone_weights import load_backbone_weights
from gdd_fast.models.backbones import build_backbone


@pytest.fixture(scope="module")
def lite0():
    return build_extractor("lite0")


@pytest.fixture(scope="module")
def real():
    dataset = demo_dataset("test", max_images=256)
    return torch.from_numpy(next(dataset.chunks()))


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_the_pixels():
    images = random_images(5, 3, 8, 8)
    features = PixelFeatures()(images)
    assert torch.equal(features, images.flatten(1) / 255)


def test_large_images_are_averaged_to_sixteen_pixels():
    images = random_images(2, 1, 32, 32)
    features = PixelFeatures()(images)
    expected = (images.float() / 255).reshape(2, 16, 2, 16, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(features, expected)


def test_lite0_is_the_backbone_on_resized_normalised_images(lite0):
    images = random_images(2, 3, 16, 16)
    x = interpolate((images / 255 - 0.5) / 0.5, size=(64, 64), mode="bilinear")
    plain = build_backbone("tf_efficientnet_lite0", load_backbone_weights("tf_efficientnet_lite0"), 64)
    torch.testing.assert_close(lite0(images), plain.pooled(x), rtol=1e-4, atol=1e-5)


def test_gray_equals_its_rgb_copy(lite0):
    gray = random_images(2, 1, 16, 16)
    torch.testing.assert_close(lite0(gray), lite0(gray.expand(-1, 3, -1, -1)))


def test_features_do_not_depend_on_the_batch(lite0, real):
    together = lite0(real[:8])
    assert together.shape == (8, 1280)
    assert together.dtype == torch.float32
    torch.testing.assert_close(torch.cat([lite0(real[i : i + 1]) for i in range(8)]), together, rtol=1e-4, atol=1e-5)


def test_distances_see_what_happened_to_the_images(lite0, real):
    """Noisier is farther, for both features; half of a set is nearest to the other half."""
    noise = torch.randn(real[96:192].shape, generator=torch.Generator().manual_seed(0))
    extractors = [lite0, PixelFeatures()]
    collect = lambda images: [population.statistics for population in gather(images.split(48), extractors)]
    reference = collect(real[:96])
    distances = []
    for strength in (0, 30):
        noisy = (real[96:192] + strength * noise).clamp(0, 255).to(torch.uint8)
        ours = collect(noisy)
        distances.append([frechet_distance(a, b) for a, b in zip(ours, reference, strict=True)])
    for kind in zip(*distances, strict=True):
        assert kind[0] < kind[1]


def test_resolution_is_part_of_the_name(lite0):
    assert lite0.name == "lite0-64"
    assert build_extractor("lite0", resolution=96).name == "lite0-96"
    assert build_extractor("pixels", resolution=8).name == "pixels-8"


def test_statistics_of_a_data_set_and_of_a_part_of_it():
    dataset = demo_dataset("test", max_images=50)
    seen = []
    (found,) = dataset_populations(dataset, [PixelFeatures()], batch=7, progress=seen.append)
    whole = found.statistics
    pixels = torch.from_numpy(next(dataset.chunks())).flatten(1).double() / 255
    assert (whole.count, sum(seen), whole.features) == (50, 50, "pixels-16")
    torch.testing.assert_close(whole.mean, pixels.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.covariance, pixels.T.cov(), rtol=1e-5, atol=1e-7)

    parts = [dataset_populations(dataset, [PixelFeatures()], max_images=20)[0].statistics for _ in range(2)]
    assert [part.count for part in parts] == [20, 20]
    assert torch.equal(parts[0].mean, parts[1].mean), "always the same ones"
    first = pixels[:20].mean(0)
    assert not torch.allclose(parts[0].mean, first), "a sample of the set, not its beginning"


def test_too_few_images():
    with pytest.raises(DataError, match="at least 2"):
        dataset_populations(demo_dataset("test", max_images=1), [PixelFeatures()])


def test_unknown_features_resolutions_and_weights(tmp_path):
    with pytest.raises(ConfigError, match="inception_v4"):
        build_extractor("inception_v4")
    with pytest.raises(ConfigError, match="multiple of 32"):
        build_extractor("lite0", resolution=50)
    with pytest.raises(ConfigError, match="at least 1"):
        build_extractor("pixels", resolution=0)
    with pytest.raises(ConfigError, match="2,048 pixels at most"):
        build_extractor("pixels", resolution=1_000_000_000)
    with pytest.raises(ConfigError, match="inception have one of their own"):
        Measurement(parse_metrics("fid"), resolution=64)
    with pytest.raises(WeightsError, match="missing"):
        build_extractor("lite0", weights=tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError):
        Lite0Features({})
