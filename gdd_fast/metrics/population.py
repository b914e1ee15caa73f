"""A set of images as one feature network sees it: what metrics are computed from, gathered batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gdd_fast.errors import DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics
from gdd_fast.ranks import ALONE, World

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
    world: World = ALONE,
    *,
    everywhere: bool = False,
) -> list[Population]:
    """Populations of uint8 image batches `(N, C, H, W)`, one for each extractor; empty without a single batch.

    With several ranks the batches are each one's `world.share`, and the main one gets the populations of all, summed in
    the order in which one process would: they are equal to the bit. Other ranks get the same with `everywhere`, else
    nothing.
    """
    needs = needs or [Needs()] * len(extractors)
    found: list[Population] = []
    forms: list[tuple[tuple[int, ...], list[int]]] = []

    def features_of_batches() -> Iterator[Tensor]:
        for images in batches:
            features = [extractor(images) for extractor in extractors]
            forms.append((tuple(images.shape[1:]), [f.shape[1] for f in features]))
            yield torch.cat(features, 1)

    form = None
    for together in world.in_order(features_of_batches(), everywhere=everywhere):
        if form is None:  # a rank without a batch of its own does not know it
            form = world.from_main(forms[0] if forms else None) if everywhere else forms[0]
        shape, sizes = form
        for i, features in enumerate(together.split(sizes, 1)):
            features = features.to(extractors[i].device)
            if i == len(found):
                found.append(_empty(extractors[i].name, shape, features, needs[i]))
            found[i].update(features)
        if progress is not None:
            progress(len(together))
    for population in found:
        population.finish()
    return found


def _empty(name: str, shape: tuple[int, ...], features: Tensor, need: Needs) -> Population:
    dim = features.shape[1]
    population = Population(name, shape)
    if need.statistics:
        population.statistics = Statistics(dim, name, features.device, image_shape=shape)
    if need.rows:
        population.rows = features.new_empty(0, dim)
    return population
