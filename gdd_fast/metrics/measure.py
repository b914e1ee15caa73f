"""The metrics by name: what each needs, and how its values are computed.

A request is `metric` or `metric@network`: `fid,kid@lite2,pr`. FID and the Inception score use Inception only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.metrics.features import FeatureExtractor, build_extractor
from gdd_fast.metrics.features.inception import InceptionFeatures
from gdd_fast.metrics.frechet import frechet_distance
from gdd_fast.metrics.inception_score import SPLITS, inception_score
from gdd_fast.metrics.kid import kernel_distance
from gdd_fast.metrics.neighbours import COVERAGE_K, PRECISION_K, density_coverage, precision_recall
from gdd_fast.metrics.population import Needs, Population
from gdd_fast.metrics.reference import choose_reference, load_references

CountImages = Callable[[Sequence[FeatureExtractor], Sequence[Needs]], list[Population]]
Compute = Callable[[Population, Population, FeatureExtractor], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A metric: what it needs from both sets, and how its values are computed from (generated, real, extractor)."""

    needs: Needs
    compute: Compute | None
    only_inception: bool = False
    least: tuple[int, int] = (2, 2)
    """The fewest generated and real images from which it can be computed."""


def _frechet(generated: Population, real: Population, _: FeatureExtractor) -> dict[str, float]:
    return {"fd": frechet_distance(generated.statistics, real.statistics)}


def _kid(generated: Population, real: Population, _: FeatureExtractor) -> dict[str, float]:
    mean, deviation = kernel_distance(generated.rows, real.rows)
    return {"kid": mean, "kid_std": deviation}


def _inception_score(generated: Population, _: Population, extractor: FeatureExtractor) -> dict[str, float]:
    mean, deviation = inception_score(extractor.logits(generated.rows))
    return {"is": mean, "is_std": deviation}


def _precision_recall(generated: Population, real: Population, _: FeatureExtractor) -> dict[str, float]:
    precision, recall = precision_recall(generated.rows, real.rows)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


def _density_coverage(generated: Population, real: Population, _: FeatureExtractor) -> dict[str, float]:
    density, coverage = density_coverage(generated.rows, real.rows)
    return {"density": density, "coverage": coverage}


_STATISTICS, _ROWS = Needs(statistics=True), Needs(statistics=False, rows=True)
METRICS: dict[str, Metric] = {
    "fid": Metric(_STATISTICS, _frechet, only_inception=True),
    "fd": Metric(_STATISTICS, _frechet),
    "kid": Metric(_ROWS, _kid),
    "is": Metric(_ROWS, _inception_score, only_inception=True, least=(SPLITS, 2)),
    "pr": Metric(_ROWS, _precision_recall, least=(PRECISION_K + 1, PRECISION_K + 1)),
    "dc": Metric(_ROWS, _density_coverage, least=(2, COVERAGE_K + 1)),
    "nn": Metric(_ROWS, None),
}
"""`nn`, nearest neighbours, needs images and is in `gdd_fast.metrics.memorisation`."""

DEFAULT_NETWORKS = {"fd": ("lite0", "pixels")}
"""By metric; the default of the others is Inception."""


@dataclass(frozen=True)
class Request:
    """One metric on one network, by their names."""

    metric: str
    network: str


def parse_metrics(metrics: str, features: str | None = None) -> list[Request]:
    """The requests in `metrics`, comma-separated; `features` are the networks of those that do not name one.

    Raises `ConfigError` for an unknown metric, a request or network given twice, FID or IS on another network than
    Inception, or a Frechet distance of LPIPS, whose covariance would have a thousand million entries.
    """
    networks = None if features is None else [name.strip() for name in features.split(",")]
    if networks is not None and len(set(networks)) < len(networks):
        raise ConfigError(f"--features has a network twice: {features}")
    found: list[Request] = []
    for text in metrics.split(","):
        name, _, network = text.strip().partition("@")
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}, each also as metric@network")
        if METRICS[name].only_inception:
            if network not in ("", "inception"):
                raise ConfigError(f"--metrics {text.strip()}: {name} needs Inception; fd@{network} does not")
            chosen = ["inception"]
        else:
            chosen = [network] if network else networks or DEFAULT_NETWORKS.get(name, ("inception",))
        found += [Request(name, network) for network in chosen]
    for request in found:
        if request.metric == "fd" and request.network.startswith("lpips"):
            raise ConfigError(
                f"--metrics fd@{request.network}: LPIPS has too many features for a covariance; it is for nn"
            )
    twice = {request for request in found if found.count(request) > 1}
    if twice:
        raise ConfigError(f"--metrics has one twice: {', '.join(sorted(f'{r.metric}@{r.network}' for r in twice))}")
    if {("fid", "inception"), ("fd", "inception")} <= {(r.metric, r.network) for r in found}:
        raise ConfigError("--metrics fid and fd@inception are the same: give one of them")
    return found


class Measurement:
    """Requests and the networks they need, ready to measure generated images any number of times.

    Args:
        requests: from `parse_metrics`.
        weights: local weight files by network.
        resolution: for the networks that allow a choice; None: their own.

    Raises:
        ConfigError, WeightsError: as `build_extractor`; also if a FID would not be one, the weights of a requested
        metric lack a part, or `weights` or `resolution` would have no effect.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        weights: Mapping[str, str | Path] | None = None,
        resolution: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.requests = list(requests)
        names = list(dict.fromkeys(request.network for request in requests))
        weights = weights or {}
        unused = sorted(set(weights) - set(names))
        if unused:
            raise ConfigError(f"--feature-weights names {', '.join(unused)}, which no metric here uses")
        fixed = ("inception", "resnet56")
        if resolution is not None and set(names) <= set(fixed):
            raise ConfigError(f"--feature-resolution has no effect: {' and '.join(names)} have one of their own")
        self.extractors = [
            build_extractor(
                name, weights=weights.get(name), resolution=None if name in fixed else resolution, device=device
            )
            for name in names
        ]
        self.needs = []
        for name in names:
            needs = [METRICS[request.metric].needs for request in requests if request.network == name]
            self.needs.append(Needs(any(n.statistics for n in needs), any(n.rows for n in needs)))
        for request in requests:
            extractor = self.extractors[names.index(request.network)]
            if request.metric == "fid" and not extractor.is_published:
                raise WeightsError(
                    f"{extractor.name} has other weights than those of 2015-12-05, so its Frechet distance is not a "
                    "FID: fd@inception measures it under its own name"
                )
            if request.metric == "is" and isinstance(extractor, InceptionFeatures):
                extractor.check_classifier()
        self._names = names

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The networks whose operators need a choice of implementation."""
        return [extractor.network for extractor in self.extractors if extractor.network is not None]

    def extractor(self, network: str) -> FeatureExtractor:
        return self.extractors[self._names.index(network)]

    def of(self, network: str, populations: Sequence[Population]) -> Population:
        """The population of `network`, from `populations` in the order of `extractors`."""
        return populations[self._names.index(network)]

    def references(
        self, paths: Sequence[str | Path], image_shape: tuple[int, ...], *, complete: bool
    ) -> list[Population | None]:
        """For each extractor, the statistics from reference files of real images; None if there are none.

        `complete`: real images will provide what the files lack. Raises `ConfigError` or `DataError` for files that do
        not fit the networks or the (C, H, W) of the images, and, without `complete`, if they lack anything.
        """
        files = [(Path(path), population) for path in paths for population in load_references(path)]
        if not files:
            return [None] * len(self.extractors)
        zeros = torch.zeros(1, *image_shape, dtype=torch.uint8)
        chosen: list[Population | None] = []
        for extractor, needs in zip(self.extractors, self.needs, strict=True):
            found = choose_reference(files, extractor.name, extractor(zeros).shape[1], image_shape, needs)
            if found is None and not complete:
                there = ", ".join(f"{p.features or 'unnamed'} ({p.statistics.dim} dimensions)" for _, p in files)
                what = "the features of every image (evaluate ref --with-features)" if needs.rows else "statistics"
                raise ConfigError(
                    f"the references hold {there}, but not {what} of {extractor.name}: give another one, the images "
                    "themselves, or other features"
                )
            chosen.append(None if found is None else found.to(extractor.device))
        return chosen

    def completed(self, known: Sequence[Population | None], count: CountImages) -> list[Population]:
        """`known`, one per extractor, with each None replaced by a result of `count(extractors, needs)`, in that order.

        Networks with a reference do not process the images. `count` may return an empty list, as it does on ranks other
        than the main one: then nothing is replaced.
        """
        found = list(known)
        lacking = [place for place, population in enumerate(found) if population is None]
        if lacking:
            counted = count([self.extractors[i] for i in lacking], [self.needs[i] for i in lacking])
            for place, population in zip(lacking, counted, strict=False):
                found[place] = population
        return found  # type: ignore[return-value]

    def check_counts(self, generated: int, real: Sequence[int | None]) -> None:
        """Raise `ConfigError` for a metric that needs more images.

        `generated`: their number. `real`: the number for each extractor, None if unknown.
        """
        for request in self.requests:
            least = METRICS[request.metric].least
            theirs = real[self._names.index(request.network)]
            for what, count, needed in (("generated", generated, least[0]), ("real", theirs, least[1])):
                if count is not None and count < needed:
                    raise ConfigError(f"{request.metric} needs at least {needed} {what} images, not {count}")

    def values(self, generated: Sequence[Population], real: Sequence[Population]) -> dict[str, float]:
        """Every requested value by its key: `fid`, `kid`, `kid_std`, `recall`; on other networks, `recall-lite0-64`.

        Both arguments are in the order of `extractors`. Raises `DataError` if there are too few images for a metric.
        """
        found: dict[str, float] = {}
        for request in self.requests:
            metric = METRICS[request.metric]
            if metric.compute is None:
                continue
            extractor = self.extractor(request.network)
            ours, theirs = self.of(request.network, generated), self.of(request.network, real)
            for name, value in metric.compute(ours, theirs, extractor).items():
                found[key_of(name, extractor)] = value
        return found


def key_of(name: str, extractor: FeatureExtractor) -> str:
    """The key of a value: for Inception the plain name, and `fid` for its Frechet distance."""
    if extractor.name == "inception":
        return {"fd": "fid"}.get(name, name)
    return f"{name}-{extractor.name}"
