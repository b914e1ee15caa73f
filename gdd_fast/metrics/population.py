"""A set of images as one feature network sees it: what metrics are computed from, gathered batch by batch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gdd_fast.errors import DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics

Progress = Callable[[int], None]  # called with the number of images just done


@dataclass
class Population:
    """Features of a set of images, as their statistics, as they are, or as both.

    `statistics`: None if no metric asked for them. `rows`: float32 (N, F) on the extractor's device, or None.
    """

    features: str
    image_shape: tuple[int, int, int] | None
    statistics: Statistics | None = None
    rows: Tensor | None = None
    count: int = 0
    _parts: list[Tensor] = field(default_factory=list, repr=False)

    def update(self, features: Tensor) -> None:
        """Add a batch, float32 (N, F). Raises `DataError` for NaN or infinite features."""
        if not bool(torch.isfinite(features).all()):
            raise DataError(
                f"{self.features} features of {len(features)} images hold NaN or infinite values: "
                "the images or the feature network's weights are broken"
            )
        self.count += len(features)
        if self.statistics is not None:
            self.statistics.update(features)
        if self.rows is not None:
            self._parts.append(features)

    def finish(self) -> None:
        """Put the batches together."""
        if self.rows is not None:
            self.rows = torch.cat([self.rows, *self._parts])
            self._parts = []

    def to(self, device: torch.device) -> "Population":
        """The features on another device; statistics stay, as a distance finds them wherever they are."""
        return replace(self, rows=None if self.rows is None else self.rows.to(device))

    def all_gather(self) -> None:
        """Give every rank of the default process group the features of all, in the order of `seeds[rank::size]`."""
        if self.statistics is not None:
            self.statistics.all_reduce()
        if self.rows is not None:
            self.rows = _interleaved(self.rows)
        count = torch.tensor([self.count], device=self._device())
        torch.distributed.all_reduce(count)
        self.count = int(count)

    def _device(self) -> torch.device:
        return self.rows.device if self.rows is not None else self.statistics.mean.device


def _interleaved(rows: Tensor) -> Tensor:
    """Rows of all ranks, of which rank r has every size-th from the r-th on; the last ranks may have one fewer."""
    size = torch.distributed.get_world_size()
    count = torch.tensor([len(rows)], device=rows.device)
    torch.distributed.all_reduce(count)
    most = -(-int(count) // size)
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    torch.distributed.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[: int(count)]


@dataclass(frozen=True)
class Needs:
    """What is to be gathered with one extractor."""

    statistics: bool = True
    rows: bool = False


def gather(
    batches: Iterable[Tensor],
    extractors: Sequence[FeatureExtractor],
    needs: Sequence[Needs] | None = None,
    progress: Progress | None = None,
) -> list[Population]:
    """Populations of uint8 image batches `(N, C, H, W)`, one for each extractor; empty without a single batch."""
    needs = needs or [Needs()] * len(extractors)
    found: list[Population] = []
    for images in batches:
        for i, (extractor, need) in enumerate(zip(extractors, needs, strict=True)):
            features = extractor(images)
            if i == len(found):
                found.append(_empty(extractor.name, images, features, need))
            found[i].update(features)
        if progress is not None:
            progress(len(images))
    for population in found:
        population.finish()
    return found


def _empty(name: str, images: Tensor, features: Tensor, need: Needs) -> Population:
    shape, dim = tuple(images.shape[1:]), features.shape[1]
    population = Population(name, shape)
    if need.statistics:
        population.statistics = Statistics(dim, name, features.device, image_shape=shape)
    if need.rows:
        population.rows = features.new_empty(0, dim)
    return population
