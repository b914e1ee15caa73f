"""The sources that `gdd_fast.prepare` can read, each as indexed images with names and classes."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from gdd_fast.data.cifar import read_cifar10
from gdd_fast.data.classes import as_classes
from gdd_fast.data.containers import Container, check_there, open_container, read_labels
from gdd_fast.data.dataset import ArrayDataset, read_npz
from gdd_fast.data.decode import decode
from gdd_fast.data.idx import find_idx_pair, read_idx_pair
from gdd_fast.errors import ConfigError, DataError

Split = Literal["train", "test"]
Labels = Literal["auto", "folders", "none"]


@dataclass(frozen=True)
class Source:
    """Images in a fixed order.

    kind: for messages; size: how many; name(i), image(i): of image i, from any thread; labels: int64 (size,) or None;
    left_out: the number of other files, which are not images, by suffix.
    """

    kind: str
    size: int
    name: Callable[[int], str]
    image: Callable[[int], Image.Image]
    labels: np.ndarray | None
    left_out: dict[str, int] = field(default_factory=dict)


def open_source(path: Path, split: Split = "train", labels: Labels = "auto") -> Source:
    """Recognise what is at `path`:

    - a folder with idx files of the MNIST family under their customary names, of which `split` is taken;
    - the CIFAR-10 Python archive, likewise;
    - an .npz that `open_dataset` can read;
    - a folder or zip of image files, at any depth.

    labels: `auto` takes those that the source states, if any (for image files, in `dataset.json`); `folders` numbers
    the first-level folders of image files in alphabetical order, or the second-level ones if there is only one; `none`
    drops labels. Raises `DataError` when it is none of these, holds no image or cannot be read.
    """
    check_there(path)
    if path.is_dir() and (pair := find_idx_pair(path, split)):
        images, classes = read_idx_pair(*pair)
        source = _from_arrays("idx files", path, images, classes)
    elif path.suffix.lower() == ".npz":
        source = _from_arrays("npz", path, *read_npz(path))
    elif path.is_file() and tarfile.is_tarfile(path):
        images, classes = read_cifar10(path, split)
        source = _from_arrays("CIFAR-10 archive", path, images.transpose(0, 2, 3, 1), classes)
    else:
        container = open_container(path)
        return _from_files(container, labels)
    if labels == "folders":
        raise ConfigError(f"--labels folders is for image files; {path} holds {source.kind}")
    return source if labels == "auto" else replace(source, labels=None)


def _from_arrays(kind: str, path: Path, images: np.ndarray, labels: np.ndarray | None) -> Source:
    arrays = ArrayDataset(str(path), images, labels)

    def image(index: int) -> Image.Image:
        pixels = arrays.image(index)
        return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    return Source(kind, len(arrays), lambda index: f"{path}: image {index}", image, arrays.labels)


def _from_files(container: Container, labels: Labels) -> Source:
    names = container.names

    def name(index: int) -> str:
        return f"{container.path}: {names[index]}"

    def image(index: int) -> Image.Image:
        return decode(container.read(names[index]), name(index))

    classes = {"auto": read_labels, "folders": _folder_classes, "none": lambda _: None}[labels](container)
    return Source("image files", len(names), name, image, classes, container.left_out)


def _folder_classes(container: Container) -> np.ndarray:
    loose = next((name for name in container.names if "/" not in name), None)
    if loose is not None:
        raise DataError(f"{container.path}: {loose} is not in a folder, so --labels folders has no class for it")
    parts = [name.split("/")[:-1] for name in container.names]
    # an archive of a folder has that folder above those of the classes
    top = 1 if len({part[0] for part in parts}) == 1 and all(len(part) > 1 for part in parts) else 0
    folders, classes = np.unique([part[top] for part in parts], return_inverse=True)
    if len(folders) == 1:
        raise DataError(f"{container.path}: all images are in {folders[0]}; --labels folders needs one per class")
    return as_classes(classes, lambda index: f"{container.path}: the number of the folder of {container.names[index]}")
