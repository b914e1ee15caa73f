"""Image data sets with random access: EDM zip, folder of images, npz."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gdd_fast.data.classes import as_classes
from gdd_fast.data.containers import LABEL_FILE, Container, check_there, open_container, read_labels
from gdd_fast.data.decode import decode, to_array
from gdd_fast.data.npz import array_names, read_arrays
from gdd_fast.data.parallel import ordered_map
from gdd_fast.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (images done, total images)."""

_CHUNK = 256
_NPZ_KEYS = (("images", "labels"), ("arr_0", "arr_1"))  # the second: as gdd_fast.sample and ADM's evaluator write


class ImageDataset(ABC):
    """Square uint8 images of one size, each with a class if the set is opened with labels.

    name: for messages and file names; resolution: height and width in pixels; channels: 1 or 3; labels: int64 (N,), or
    None without labels; label_dim: number of classes, 0 without labels. Reading is safe from several threads and from
    forked or spawned worker processes.
    """

    def __init__(self, name: str, shape: tuple[int, ...], labels: np.ndarray | None, chosen: np.ndarray):
        """`shape`: (C, H, W) of every image; `labels`: int64 of every stored image; `chosen`: which ones to include."""
        channels, height, width = shape
        if height != width:
            raise DataError(f"{name}: images are {width}x{height}, not square: gdd_fast.prepare --crop center")
        self.name = name
        self.shape = (channels, height, width)
        self.resolution = height
        self.channels = channels
        # Counted over all stored images, so that `max_images` does not change the network.
        self.label_dim = 0 if labels is None else int(labels.max()) + 1
        self.labels = None if labels is None else labels[chosen]
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (C, H, W); `DataError` naming the file if it is corrupt or of another size."""
        return self._read(int(self._chosen[index]))

    def label(self, index: int) -> int:
        """Class of image `index`. Raises `DataError` if opened without labels."""
        if self.labels is None:
            raise DataError(f"{self.name}: opened without labels")
        return int(self.labels[index])

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Several images as uint8 (len(indices), C, H, W)."""
        batch = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices):
            batch[row] = self.image(index)
        return batch

    def chunks(
        self, indices: Sequence[int] | np.ndarray | None = None, progress: Progress | None = None, size: int = _CHUNK
    ) -> Iterator[np.ndarray]:
        """All images, or those of `indices`, in order, as arrays of `size`, decoded by a pool of threads."""
        indices = range(len(self)) if indices is None else indices
        done = 0
        for chunk in ordered_map(self.images, (indices[k : k + size] for k in range(0, len(indices), size))):
            done += len(chunk)
            if progress is not None:
                progress(done, len(indices))
            yield chunk

    def validate(self, indices: Sequence[int] | np.ndarray | None = None, progress: Progress | None = None) -> None:
        """Read and check every image, or those of `indices`; `DataError` for the first bad one."""
        for _ in self.chunks(indices, progress):
            pass

    @abstractmethod
    def _read(self, stored: int) -> np.ndarray:
        """Stored image `stored` as uint8 (C, H, W), checked."""


class FileDataset(ImageDataset):
    """Image files in a folder or a zip archive, sorted by name; classes from `dataset.json`."""

    def __init__(self, container: Container, *, use_labels: bool = False, max_images: int | None = None):
        self._container = container
        first = container.names[0]
        shape = to_array(decode(container.read(first), self._where(first)), self._where(first)).shape
        labels = read_labels(container) if use_labels else None
        if use_labels and labels is None:
            raise DataError(
                f"{container.path}: labels were requested, but {LABEL_FILE} is missing or says null; "
                "gdd_fast.prepare --labels folders makes them from folder names"
            )
        super().__init__(container.path.absolute().stem, shape, labels, choose_images(len(container.names), max_images))

    def _where(self, name: str) -> str:
        return f"{self._container.path}: {name}"

    def _read(self, stored: int) -> np.ndarray:
        name = self._container.names[stored]
        pixels = to_array(decode(self._container.read(name), self._where(name)), self._where(name))
        if pixels.shape != self.shape:
            raise DataError(
                f"{self._where(name)} has shape {pixels.shape}, but {self._container.names[0]} {self.shape} "
                "(channels, height, width); all must be alike: gdd_fast.prepare resizes and converts"
            )
        return pixels


class ArrayDataset(ImageDataset):
    """Images held in memory: uint8 (N, H, W) or (N, H, W, C), with integer labels (N,) or None."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray | None = None, *, max_images: int | None = None
    ):
        if images.ndim == 3:
            images = images[..., np.newaxis]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(
                f"{name}: images must be uint8 (N, H, W) or (N, H, W, 1 or 3), not {images.dtype} {images.shape}"
            )
        if len(images) == 0:
            raise DataError(f"{name}: holds no image")
        if labels is not None:
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise DataError(
                    f"{name}: labels must be {len(images)} integers from 0, not {labels.dtype} {labels.shape}"
                )
            labels = as_classes(labels, lambda index: f"{name}: the label of image {index}")
        self._images = images.transpose(0, 3, 1, 2)
        super().__init__(name, self._images.shape[1:], labels, choose_images(len(images), max_images))

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._images[self._chosen[indices]])

    def _read(self, stored: int) -> np.ndarray:
        return np.ascontiguousarray(self._images[stored])


def open_dataset(path: str | Path, *, use_labels: bool = False, max_images: int | None = None) -> ImageDataset:
    """Open an image set.

    path: an EDM zip (image files and, for labels, `dataset.json`), a folder of the same form, or an .npz with `images`
    uint8 (N, H, W) or (N, H, W, C) and, for labels, `labels` integer (N,).
    use_labels: read classes, which every image must have; training uses them as one-hot labels. max_images: at most
    that many, chosen at random with a fixed seed as EDM's `max_size` does, so that a set that is sorted by class stays
    balanced.

    Only the first image is decoded here; `ImageDataset.validate` and `BatchStream` check all of them.
    Raises `DataError` for a path that is missing, not an image set or empty, for images that are not square or not gray
    or RGB, and for requested labels that are missing, incomplete or not class numbers (0 to 99,999).
    """
    path = Path(path)
    check_there(path)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: this user may not read it")
    if path.suffix.lower() == ".npz":
        images, labels = read_npz(path)
        if use_labels and labels is None:
            raise DataError(f"{path}: labels were requested, but it holds no array `labels`")
        return ArrayDataset(path.stem, images, labels if use_labels else None, max_images=max_images)
    return FileDataset(open_container(path), use_labels=use_labels, max_images=max_images)


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and labels (or None) of an .npz, not checked; `DataError` when it cannot be read or has no images."""
    there = array_names(path)
    for images, labels in _NPZ_KEYS:
        if images in there:
            arrays = read_arrays(path, (images, labels))
            return arrays[images], arrays.get(labels)
    raise DataError(f"{path}: holds no array `images` (it has: {', '.join(there) or 'nothing'})")


def choose_images(total: int, max_images: int | None) -> np.ndarray:
    """Ascending indices of at most `max_images` of `total` images, chosen with a fixed seed as by EDM's `max_size`.

    Raises `DataError` for `max_images` below 1.
    """
    if max_images is None or max_images >= total:
        return np.arange(total)
    if max_images < 1:
        raise DataError(f"max_images must be at least 1, not {max_images}")
    return np.sort(np.random.RandomState(0).permutation(total)[:max_images])
