"""Populations of data sets and of generators, for any number of feature extractors in one pass over the images."""

from collections.abc import Sequence
from typing import Any

import torch

from gdd_fast.data.dataset import ImageDataset, choose_images
from gdd_fast.errors import DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics
from gdd_fast.metrics.population import Needs, Population, Progress, gather
from gdd_fast.ranks import ALONE, World
from gdd_fast.sampling.generate import SamplerConfig, generate


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
    """What metrics need of the images of `dataset`, one for each feature extractor.

    `max_images` takes that many at random, always the same ones, so that a set sorted by class stays balanced. `world`,
    `everywhere`: see `population.gather`. Raises `DataError` for an image that cannot be read, and with fewer than two
    images.
    """
    indices = choose_images(len(dataset), max_images).tolist()
    batches = (torch.from_numpy(images) for images in dataset.chunks(world.share(indices, batch), size=batch))
    found = gather(batches, extractors, needs, progress, world, everywhere=everywhere)
    return _enough(found) if world.is_main else found


def generator_populations(
    net: torch.nn.Module,
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
    """What metrics need of the images of `seeds`. Arguments as of `sampling.generate.generate` and `population.gather`.

    From the generator to the features images stay on the device.
    """
    batches = generate(net, world.share(seeds, batch), sampler, batch=batch, **options)
    images = (part.images.permute(0, 3, 1, 2) for part in batches)
    return gather(images, extractors, needs, progress, world, everywhere=everywhere)


def dataset_statistics(dataset: ImageDataset, extractors: Sequence[FeatureExtractor], **options) -> list[Statistics]:
    """Statistics of the images of `dataset`; options as of `dataset_populations`."""
    return [population.statistics for population in dataset_populations(dataset, extractors, **options)]


def generator_statistics(
    net: torch.nn.Module,
    extractors: Sequence[FeatureExtractor],
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    **options,
) -> list[Statistics]:
    """Statistics of the images of `seeds`; options as of `generator_populations`."""
    found = _enough(generator_populations(net, extractors, seeds, sampler, **options))
    return [population.statistics for population in found]


def _enough(populations: list[Population]) -> list[Population]:
    count = populations[0].count if populations else 0
    if count < 2:
        raise DataError(f"statistics need at least 2 images, not {count}")
    return populations
