"""The launches of benchmarks/counts/host_gpu.py's stub, as the driver sees them."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.counts.host_gpu import Stub

_WATCHER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


class Seen(NamedTuple):
    """Arguments by name, numbers as their bits and tensors as their addresses."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    numbers: dict[str, int]
    addresses: dict[str, int]


@contextlib.contextmanager
def watched(stub: Stub) -> Iterator[list[Seen]]:
    """All launches inside."""
    found: list[Seen] = []

    def note(function, grid, threads, shared, params) -> None:
        compiled = stub.compiled[function]
        numbers, addresses = {}, {}
        types = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        for i, (name, kind) in enumerate(types.items()):
            wide = kind.startswith("*") or kind.endswith("64")
            bits = (ctypes.c_uint64 if wide else ctypes.c_uint32).from_address(params[i]).value
            (addresses if kind.startswith("*") else numbers)[name] = bits
        found.append(Seen(compiled.name, tuple(grid[:3]), threads, shared, numbers, addresses))

    watcher, place = _WATCHER(note), ctypes.c_void_p.in_dll(stub.library, "gdd_watcher")
    place.value = ctypes.cast(watcher, ctypes.c_void_p).value
    try:
        yield found
    finally:
        place.value = None
