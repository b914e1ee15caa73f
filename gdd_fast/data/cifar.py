"""The CIFAR-10 Python archive, read without executing anything.

`cifar-10-python.tar.gz` holds pickles, and an ordinary unpickler runs whatever a pickle asks for. The few names
that the original files need are mapped here to inert stand-ins; every other name is refused.
"""

import io
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gdd_fast.errors import DataError

_MEMBERS = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
_MAX_BYTES = 128 << 20  # of one batch; the original's are 31 MB
_MAX_TUPLES = 20_000  # the original has 5, a copy that was pickled again has one per file name


def read_cifar10(path: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of `split` ("train" or "test").

    Raises `DataError` when the archive cannot be read, a batch is missing, or a batch holds anything other than plain
    data of the right shape; nothing in it is executed.
    """
    path = Path(path)
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            found = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
            for name in _MEMBERS[split]:
                if name not in found:
                    raise DataError(f"{path}: not a CIFAR-10 python archive: it has no {name}")
                if found[name].size > _MAX_BYTES:
                    raise DataError(f"{path}: {name} has {found[name].size} bytes, far more than a CIFAR-10 batch")
                x, y = parse_batch(archive.extractfile(found[name]).read(), f"{path}: {name}")
                images.append(x)
                labels.append(y)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable tar archive: {error}") from error
    return np.concatenate(images), np.concatenate(labels)


def parse_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One pickled batch: images uint8 (N, 3, 32, 32), labels int64 (N,). `where` names it in errors."""
    try:
        _check_structure(content)
        batch = _InertUnpickler(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{where}: a damaged pickle: {error!r}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds a {type(batch).__name__}, not the dictionary of a CIFAR-10 batch")
    # Copies of the archive that were pickled again under Python 3 have bytes as keys.
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise DataError(f"{where}: not a CIFAR-10 batch: it lacks an array `data` or a list `labels`")
    if any(type(label) is not int or not 0 <= label < 10 for label in labels):
        raise DataError(f"{where}: not a CIFAR-10 batch: its labels are not all from 0 to 9")
    return pixels.value((len(labels), 3072), where).reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _check_structure(content: bytes) -> None:
    """Refuse what would exhaust memory or stack in the unpickler itself, before it is run.

    Its memo is an array as long as the largest index, and hashing nested tuples is recursive without a limit.
    """
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument >= len(content):
            raise pickle.UnpicklingError("refused: a memo index beyond the length of the file")
        tuples += opcode.name.startswith(("TUPLE", "FROZENSET"))
        if tuples > _MAX_TUPLES:
            raise pickle.UnpicklingError("refused: far more tuples than a CIFAR-10 batch has")


class _Array:
    """Holds the state of a pickled ndarray, which becomes an array only after it has been checked."""

    def __init__(self):
        self.state = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def value(self, shape: tuple[int, int], where: str) -> np.ndarray:
        """The array, if it is a C-ordered one of unsigned bytes, of `shape`."""
        try:
            _, stated, dtype, fortran, content = self.state
            content = content.encode("latin1") if isinstance(content, str) else content
            if dtype.code != "u1" or fortran or stated != shape:
                raise ValueError("another type, order or shape")
            return np.frombuffer(content, np.uint8).reshape(shape)
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: `data` is not a plain array of unsigned bytes {shape}") from error


class _Dtype:
    """The name of a pickled dtype; the rest of its state (byte order and the like) does not matter for bytes."""

    def __init__(self, code: object):
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, strings, numbers and the two classes above; refuses every other name."""

    def find_class(self, module: str, name: str) -> Callable:
        # New functions for each call: a pickle may set attributes on them, and must not reach anything shared.
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return lambda *_: _Array()
        if (module, name) == ("numpy", "dtype"):
            return lambda code="", *_: _Dtype(code)
        if (module, name) == ("numpy", "ndarray"):
            return lambda *_: None  # only ever named, as an argument of _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: str.encode(text, "latin1")
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which no CIFAR-10 batch needs")

    def persistent_load(self, key: object) -> None:
        raise pickle.UnpicklingError("refused: it refers to an object outside itself")
