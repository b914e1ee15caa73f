"""Metrics by name: what is asked for, the keys of what comes back, and what each value says of sets that are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from gdd_fast.errors import ConfigError, DataError, WeightsError
from gdd_fast.metrics import measure
from gdd_fast.metrics.features.inception import InceptionFeatures, InceptionV3
from gdd_fast.metrics.inception_score import inception_score
from gdd_fast.metrics.kid import kernel_distance
from gdd_fast.metrics.measure import Measurement, Request, key_of, parse_metrics
from gdd_fast.metrics.memorisation import Memorisation
from gdd_fast.metrics.names import is_better, label
from gdd_fast.metrics.neighbours import nearest, precision_recall, share_nearer, squared_radii
from gdd_fast.metrics.population import Needs, gather


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int = 0, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_requests():
    assert parse_metrics("fid, kid@lite2") == [Request("fid", "inception"), Request("kid", "lite2")]
    assert parse_metrics("fd") == [Request("fd", "lite0"), Request("fd", "pixels")]
    assert parse_metrics("fd,pr,fid", "lite2") == [
        Request("fd", "lite2"),
        Request("pr", "lite2"),
        Request("fid", "inception"),
    ]
    for bad, message in {
        "fdi": "fdi",
        "is@lite0": "needs Inception",
        "kid,kid@inception": "twice",
        "fd@lpips": "too many features",
        "": "choose",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_metrics(bad)


def test_values_have_the_network_in_their_keys_unless_it_is_inception():
    measurement = Measurement(parse_metrics("fd@pixels,kid@pixels,pr@pixels,dc@pixels"))
    sets = [gather(x.split(50), measurement.extractors, measurement.needs) for x in (images(120), images(100, 1, 60))]
    values = measurement.values(*sets)
    assert values.keys() == {
        "fd-pixels-16",
        "kid-pixels-16",
        "kid_std-pixels-16",
        "precision-pixels-16",
        "recall-pixels-16",
        "f1-pixels-16",
        "density-pixels-16",
        "coverage-pixels-16",
    }
    assert values["fd-pixels-16"] > 0.1
    assert label("fd-pixels-16") == "FD-pixels-16" and label("recall") == "recall" and label("fid") == "FID"

    class Inception:
        name = "inception"

    assert [key_of(name, Inception) for name in ("fd", "kid_std", "recall")] == ["fid", "kid_std", "recall"]


def test_too_few_images_are_refused_by_the_metric_they_are_too_few_for(monkeypatch):
    measurement = Measurement(parse_metrics("fd@pixels,kid@pixels,pr@pixels,dc@pixels"))
    measurement.check_counts(4, [6])
    measurement.check_counts(4, [None])
    for generated, real, message in (
        (3, 6, "pr needs at least 4 generated images, not 3"),
        (4, 3, "pr needs at least 4 real images, not 3"),
        (4, 5, "dc needs at least 6 real images, not 5"),
        (1, 6, "fd needs at least 2 generated images, not 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            measurement.check_counts(generated, [real])
    # These are the fewest that the values can be computed of.
    sets = [gather([images(n, n)], measurement.extractors, measurement.needs) for n in (4, 6)]
    assert len(measurement.values(*sets)) == 8


def test_which_value_is_better():
    assert is_better("fid", 1.5, 2) and not is_better("kid-lite2-64", 2, 1)
    assert is_better("recall-lite2-64", 0.6, 0.5) and is_better("f1", 0.6, 0.5) and not is_better("is", 1, 2)


def test_only_what_is_needed_is_gathered():
    measurement = Measurement(parse_metrics("fd@pixels"))
    assert measurement.needs == [Needs(statistics=True, rows=False)]
    (population,) = gather(images(10).split(4), measurement.extractors, measurement.needs)
    assert population.rows is None and population.statistics.count == population.count == 10


def test_other_weights_than_the_published_measure_no_fid(monkeypatch):
    weights = InceptionV3().state_dict()
    monkeypatch.setattr(measure, "build_extractor", lambda *_, **__: InceptionFeatures(weights))
    with pytest.raises(WeightsError, match="not a FID"):
        Measurement(parse_metrics("fid"))
    without = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    monkeypatch.setattr(measure, "build_extractor", lambda *_, **__: InceptionFeatures(without))
    with pytest.raises(WeightsError, match="no classifier"):
        Measurement(parse_metrics("is"))


def test_weights_for_a_network_that_nothing_uses():
    with pytest.raises(ConfigError, match="lite2"):
        Measurement(parse_metrics("fd@pixels"), weights={"lite2": "x.pth"})


def test_neighbours_of_points_on_a_line():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert squared_radii(x, 1).tolist() == [1, 1, 4, 16]
    assert squared_radii(x, 2).tolist() == [9, 4, 9, 36]
    found = nearest(torch.tensor([[0.9], [6.0]]), x)
    assert found.index.tolist() == [1, 3]
    torch.testing.assert_close(found.distance, torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize("tile", [3, 64])
def test_a_generator_that_dropped_a_mode_has_precision_and_no_recall_there(monkeypatch, tile):
    monkeypatch.setattr("gdd_fast.metrics.neighbours.TILE", tile)
    real = torch.cat([normal(40, 3), normal(40, 3, 1) + 100])
    generated = normal(40, 3, 2) * 0.7
    precision, recall = precision_recall(generated, real)
    assert precision > 0.8
    assert 0.2 < recall <= 0.5


def test_equal_sets_and_far_ones():
    x = normal(50, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    mean, deviation = kernel_distance(x, normal(50, 4, 3), subsets=3)
    assert abs(mean) < 0.5 and deviation < 1e-6
    assert kernel_distance(x, x + 3, subsets=3)[0] > 10


def test_too_few_images():
    few = normal(3, 4)
    for metric in (
        lambda: precision_recall(few, few),
        lambda: inception_score(few),
        lambda: kernel_distance(few[:1], few),
    ):
        with pytest.raises(DataError, match="images"):
            metric()


def test_an_inception_score_is_the_number_of_classes_at_best():
    logits = torch.eye(5).repeat(800, 1) * 100
    assert inception_score(logits)[0] == pytest.approx(5, rel=0.02)
    assert inception_score(logits[:, :1].expand(-1, 5))[0] == pytest.approx(1)


def test_copies_are_told_from_new_images(tmp_path):
    training, held_out = normal(200, 6), normal(100, 6, 1)
    new, copies = normal(150, 6, 2), training[:150] + normal(150, 6, 3) * 0.01
    shares = [Memorisation.of(x, training, held_out).values()["nn_share_nearer"] for x in (new, copies)]
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[1] > 0.99
    found = Memorisation.of(copies, training)
    assert torch.equal(found.samples.index, torch.arange(150))
    assert found.values().keys() == {"nn_distance"}
    asked = []

    def pictures(gray):
        def of(places):
            asked.append(list(places))
            return torch.full((len(places), 1, 8, 8), gray, dtype=torch.uint8)

        return of

    found.save_sheet(tmp_path / "sheet.png", pictures(200), pictures(100))
    assert asked[0] == asked[1] and len(asked[0]) == 24, "each sample and the image it copies"
    column = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png").convert("L"))[:, 40])
    lines = [int(gray) for gray in column.unique_consecutive() if int(gray) in (100, 200)]
    assert lines == [200, 100] * 4, "samples above them"


def test_ties_count_half():
    same = torch.ones(10)
    assert share_nearer(same, same) == pytest.approx(0.5)
    assert share_nearer(same * 0.5, same) == 1 and share_nearer(same * 2, same) == 0
