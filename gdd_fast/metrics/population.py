"""A set of images as one feature network sees it, gathered batch by batch: the input of metrics."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.data.dataset import ImageDataset, choose_images
from gdd_fast.errors import DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics, check_finite
from gdd_fast.ranks import ALONE, World
from gdd_fast.sampling.generate import SamplerConfig, generate

Progress = Callable[[int], None]  # called with the number of images just done


@dataclass
class Population:
    """Features of a set of images: their statistics, the features themselves, or both.

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
        check_finite(features, self.features)
        self.count += len(features)
        if self.statistics is not None:
            self.statistics.update(features)
        if self.rows is not None:
            self._parts.append(features)

    def finish(self) -> None:
        """Concatenate the batches."""
        if self.rows is not None:
            self.rows = torch.cat([self.rows, *self._parts])
            self._parts = []

    def to(self, device: torch.device) -> "Population":
        """A copy with the features on `device`; statistics are not moved, as distances work across devices."""
        return replace(self, rows=None if self.rows is None else self.rows.to(device))


@dataclass(frozen=True)
class Needs:
    """What to gather with one extractor."""

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
    """Populations of uint8 image batches `(N, C, H, W)`, one per extractor; empty if there is no batch.

    With several ranks, `batches` are each rank's `world.share`, and the main rank gets the populations of all, summed
    in the order of a single process, so that they are bitwise equal to its. Other ranks get the same with `everywhere`,
    else an empty list.
    """
    needs = needs or [Needs()] * len(extractors)
    found: list[Population] = []
    of_batches = ((tuple(images.shape[1:]), [extractor(images) for extractor in extractors]) for images in batches)
    for shape, features in world.in_order(of_batches, everywhere=everywhere):
        for i, (extractor, own) in enumerate(zip(extractors, features, strict=True)):
            own = own.to(extractor.device)
            if i == len(found):
                found.append(_empty(extractor.name, shape, own, needs[i]))
            found[i].update(own)
        if progress is not None:
            progress(len(own))
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


def dataset_populations(
    dataset: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    needs: Sequence[Needs] | None = None,
    *,
    batch: int = 64,
    max_images: int | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    everywhere: bool = False,
) -> list[Population]:
    """What metrics need from the images of `dataset`, one population per feature extractor.

    `max_images` takes that many at random, always the same ones, so that a set sorted by class stays balanced. `world`,
    `everywhere`: see `gather`. Raises `DataError` for an image that cannot be read, or fewer than two images.
    """
    indices = choose_images(len(dataset), max_images).tolist()
    batches = (torch.from_numpy(images) for images in dataset.chunks(world.share(indices, batch), size=batch))
    found = gather(batches, extractors, needs, progress, world, everywhere=everywhere)
    count = found[0].count if found else 0
    if world.is_main and count < 2:
        raise DataError(f"statistics need at least 2 images, not {count}")
    return found


def generator_populations(
    net: nn.Module,
    extractors: Sequence[FeatureExtractor],
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    needs: Sequence[Needs] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
    world: World = ALONE,
    everywhere: bool = False,
    **options: Any,
) -> list[Population]:
    """What metrics need from the images of `seeds`. Arguments as for `sampling.generate.generate` and `gather`.

    Images stay on the device between generator and features.
    """
    batches = generate(net, world.share(seeds, batch), sampler, batch=batch, **options)
    images = (part.images.permute(0, 3, 1, 2) for part in batches)
    return gather(images, extractors, needs, progress, world, everywhere=everywhere)
