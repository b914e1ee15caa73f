"""Arrays of an .npz, read only if their sizes are as stated and nothing would have to be executed."""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gdd_fast.errors import DataError

# What zipfile and NumPy raise for files that are not an .npz of plain arrays, unparsable headers included.
_ERRORS = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, SyntaxError, tokenize.TokenError)
_ERRORS += (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def array_names(path: Path) -> list[str]:
    """The names of the arrays in `path`. Raises `DataError` if it is not an .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _ERRORS as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from error


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays in `path` whose names are among `names`.

    Raises `DataError` for a file that is not an .npz of plain arrays, for an array whose size differs from its
    header's, and for one that expands far more than any real one would.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            for name in names:
                if f"{name}.npy" in there:
                    info = archive.getinfo(f"{name}.npy")
                    check_expansion(info.file_size, info.compress_size)
                    with archive.open(info) as file:
                        found[name] = _read_array(file, info.file_size)
    except _ERRORS as error:
        raise DataError(f"{path} is not a readable .npz of plain arrays: {error}") from error
    return found


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file. Raises `DataError` as `read_arrays`."""
    try:
        with path.open("rb") as file:
            return _read_array(file, path.stat().st_size)
    except _ERRORS as error:
        raise DataError(f"{path} is not a readable .npy file of plain numbers: {error}") from error


def _read_array(file: BinaryIO, size: int) -> np.ndarray:
    """An array of the .npy format in `size` bytes. Raises one of `_ERRORS`."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its format has version {version}")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} {shape}")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of {dtype} {shape} in {size} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def check_expansion(size: int, compressed: int) -> None:
    """Raise `ValueError` for a file that expands to `size` bytes from too few: photographs, and even drawings, do not.

    Without this, an archive of a few megabytes could fill any memory. Up to 64 MiB everything is accepted.
    """
    if size > max(64 << 20, 100 * compressed):
        raise ValueError(f"{compressed:,} bytes would unpack to {size:,}, which no data set does")
