"""Statistics of data sets and of generators, for any number of feature extractors in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gdd_fast.backend import Backend
from gdd_fast.data.dataset import ImageDataset, choose_images
from gdd_fast.errors import DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics
from gdd_fast.sampling.generate import SamplerConfig, generate

Progress = Callable[[int], None]  # called with the number of images just done


def dataset_statistics(
    dataset: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    *,
    batch: int = 64,
    max_images: int | None = None,
    progress: Progress | None = None,
) -> list[Statistics]:
    """Statistics of the images of `dataset`, one a feature extractor.

    `max_images` takes that many at random, always the same ones, so that a set sorted by class stays balanced.
    Raises `DataError` for an image that cannot be read, and with fewer than two images.
    """
    return collect(_image_batches(dataset, batch, max_images), extractors, progress)


def generator_statistics(
    net: torch.nn.Module,
    extractors: Sequence[FeatureExtractor],
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    *,
    batch: int = 64,
    class_index: int | None = None,
    generator_device: torch.device | str = "cpu",
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> list[Statistics]:
    """Statistics of the images of `seeds`, one a feature extractor. Arguments as `sampling.generate.generate`."""
    options = {"batch": batch, "class_index": class_index, "generator_device": generator_device, "backend": backend}
    batches = generate(net, seeds, sampler, **options)
    return collect((part.images.permute(0, 3, 1, 2) for part in batches), extractors, progress)


def collect(
    batches: Iterable[Tensor], extractors: Sequence[FeatureExtractor], progress: Progress | None = None
) -> list[Statistics]:
    """Statistics of uint8 image batches `(N, C, H, W)`, one a feature extractor."""
    found: list[Statistics] = []
    for images in batches:
        features = [extractor(images) for extractor in extractors]
        if not found:
            pairs = zip(extractors, features, strict=True)
            shape = tuple(images.shape[1:])
            found = [Statistics(f.shape[1], e.name, f.device, image_shape=shape) for e, f in pairs]
        for statistics, part in zip(found, features, strict=True):
            statistics.update(part)
        if progress is not None:
            progress(len(images))
    count = found[0].count if found else 0
    if count < 2:
        raise DataError(f"statistics need at least 2 images, not {count}")
    return found


def _image_batches(dataset: ImageDataset, batch: int, max_images: int | None) -> Iterator[Tensor]:
    for chunk in dataset.chunks(choose_images(len(dataset), max_images)):
        yield from torch.from_numpy(chunk).split(batch)
