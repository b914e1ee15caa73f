"""The idx format of the MNIST family: a big-endian header, then raw bytes; may be gzipped."""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from gdd_fast.errors import DataError

_UINT8 = 0x08
_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: str | Path) -> np.ndarray:
    """One idx file of unsigned bytes, as a uint8 array of the shape its header states.

    Raises `DataError` if the file is missing, not an idx file of unsigned bytes, or not as long as its header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise DataError(f"{path}: not an idx file of unsigned bytes")
    ndim = content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path}: ends inside its idx header")
    shape = tuple(int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(ndim))
    if len(content) - start != prod(shape):
        raise DataError(f"{path}: its header says {shape}, but {len(content) - start} bytes follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def find_idx_pair(folder: str | Path, split: str) -> tuple[Path, Path] | None:
    """The image and label files of `split` ("train" or "test") under their customary names, or None."""
    stem = _PREFIX[split]
    for suffix in ("", ".gz"):
        images = Path(folder) / f"{stem}-images-idx3-ubyte{suffix}"
        labels = Path(folder) / f"{stem}-labels-idx1-ubyte{suffix}"
        if images.is_file() and labels.is_file():
            return images, labels
    return None


def read_idx_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W) and labels uint8 (N,) of a pair of idx files. Raises `DataError` if they do not match."""
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise DataError(f"{images} has shape {x.shape} and {labels} {y.shape}: expected (N, H, W) and (N,)")
    return x, y
