"""Reads pickles of nested dicts of NumPy arrays, such as EDM2's statistics and JAX weights, without unpickling them.

`Machine` evaluates the opcodes, and arrays are rebuilt from their bytes.
"""

import math
from pathlib import Path

import numpy as np

from gdd_fast.errors import UnsafePickleError
from gdd_fast.models.files.pickle_machine import Constructor, Machine, Reader, StandIn
from gdd_fast.models.files.pickle_tensors import NumpyType, numpy_scalar


class _Array(StandIn):
    """For `numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), b"b")` and the state that follows."""

    __slots__ = ("value",)

    def __init__(self, arguments: tuple) -> None:
        if len(arguments) != 3 or arguments[0] != "numpy.ndarray":
            raise UnsafePickleError("the pickle reconstructs something that is not a NumPy array")
        self.value: np.ndarray | None = None

    def build(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), NumpyType() as kind, bool(fortran), memoryview() as data):
                self.value = _from_bytes(shape, kind, fortran, data)
            case _:
                raise UnsafePickleError("the pickle has a NumPy array that is not of plain numbers")


def _from_bytes(shape: tuple, kind: NumpyType, fortran: bool, data: memoryview) -> np.ndarray:
    dtype = np.dtype(kind.order + kind.code)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise UnsafePickleError("the pickle has a NumPy array whose shape is not of numbers")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise UnsafePickleError(f"the pickle has a NumPy array of shape {shape} with {len(data)} bytes; it is corrupt")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


_GLOBALS = {"numpy.ndarray": "numpy.ndarray", "numpy.dtype": Constructor(NumpyType)} | {
    f"{module}.{name}": Constructor(make)
    for module in ("numpy.core", "numpy._core")
    for name, make in {
        "multiarray._reconstruct": _Array,
        "multiarray.scalar": numpy_scalar,
    }.items()
}


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file, under its keys joined by dots: `{"fid": {"mu": a}}` -> `{"fid.mu": a}`.

    Nothing in the file is executed; values that are neither dicts nor arrays are left out. Raises `UnsafePickleError`
    if it holds anything other than plain containers, arrays, numbers and strings.
    """
    content = Machine(Reader(memoryview(path.read_bytes())), _GLOBALS).load()
    found: dict[str, np.ndarray] = {}
    pending = [("", content)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, dict):
            if len(found) + len(pending) + len(value) > 100_000:
                raise UnsafePickleError("the dicts in the file unfold into too many arrays")
            pending += [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in reversed(value.items())]
        elif isinstance(value, _Array) and value.value is not None:
            found[prefix] = value.value
    return found
