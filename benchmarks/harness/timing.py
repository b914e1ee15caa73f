"""How a time is taken: rounds of one call, on a device that is idle before and has cold caches.

    timing, outputs = measure(call, device)

`call()` does the work once and returns its outputs. On a GPU a round has two parts: one from an idle device (host and
wall time), one with the queue filled beforehand (device time between two events, without launch latency). Calls of more
than `_LONG` seconds are timed once per round; launch latency does not matter there.

A call with `parts`, as `WithParts` makes it, stands for work of which some is done more rarely, such as the R1 step of
every sixteenth iteration. Every round times each part once, and a part's time counts by its share.
"""

import contextlib
import ctypes
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.results import Times

Call = Callable[[], Any]
Components = Sequence[tuple[Call, float]]
"""Calls, each with the times a whole call has it: 1/16 is once in sixteen."""

_LONG = 0.02
_VERY_LONG = 1.0  # a call that needs no second one to be warm: it has run before, to be checked
_SLEEP_CYCLES_PER_SECOND = 2e9  # at least as fast as any GPU's clock: the queue is filled long enough, or a bit longer
_FLUSH_CPU = 16 << 20
_FLUSH_GPU_CACHES = 4  # times the L2
_REST = 0.01  # seconds in which threads that wait for more work go to sleep
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of mallopt(3)


@dataclass(frozen=True)
class Timing:
    """Quantiles over `rounds` rounds; host and device on a GPU alone, cpu (process time of all threads) on a CPU."""

    rounds: int
    wall: Times
    host: Times | None = None
    device: Times | None = None
    cpu: Times | None = None


class WithParts:
    """The call that runs each of `parts` once and returns what the last one returns; `Sampler` counts their shares."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts

    def __call__(self) -> Any:
        outputs = None
        for part, _ in self.parts:
            outputs = part()
        return outputs


class Sampler:
    """Takes rounds of `call` one by one, so that others (pytest-benchmark) can drive it too."""

    def __init__(self, call: Call, device: torch.device) -> None:
        if device.type == "cpu":
            reuse_memory()
        self.device, self._gpu = device, device.type == "cuda"
        self._parts: Components = getattr(call, "parts", [(call, 1.0)])
        size = _FLUSH_CPU
        if self._gpu:
            size = _FLUSH_GPU_CACHES * max(torch.cuda.get_device_properties(device).L2_cache_size, 16 << 20)
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self._samples: dict[str, list[float]] = {}
        self._host_estimate = 0.0
        self._queued = False

    def warm_up(self, seconds: float = 0.1, least: int = 2) -> float:
        """Call at least `least` times and for `seconds`, or once if that takes a second; the shortest time in s."""
        shortest, start, calls = math.inf, time.perf_counter(), 0
        while calls == 0 or (shortest < _VERY_LONG and (calls < least or time.perf_counter() - start < seconds)):
            taken, _ = self._from_idle()
            shortest, calls = min(shortest, taken["wall"]), calls + 1
            self._host_estimate = taken.get("host", 0.0)
        self._queued = self._gpu and shortest < _LONG and len(self._parts) == 1
        return shortest

    def round(self) -> Any:
        """One measured round; returns the outputs of the call, or of its last part."""
        self._forget_others()
        seconds, outputs = self._from_idle()
        if self._queued:
            outputs = None  # freed first, so that the allocator can give the same memory again
            seconds["device"], outputs = self._from_full_queue()
        for clock, value in seconds.items():
            self._samples.setdefault(clock, []).append(value)
        return outputs

    def _forget_others(self) -> None:
        """The next call finds no data in caches and, on a CPU, no spinning thread of another peer or of PyTorch."""
        if self._gpu:
            self._flush.zero_()
            return
        ctypes.memset(self._flush.data_ptr(), 0, self._flush.nbytes)  # PyTorch would wake its threads for it
        time.sleep(_REST)

    def timing(self) -> Timing:
        """Figures of the rounds so far."""
        quantiles = {clock: np.quantile(values, (0.2, 0.5, 0.8)).tolist() for clock, values in self._samples.items()}
        return Timing(len(self._samples["wall"]), **quantiles)

    def _from_idle(self) -> tuple[dict[str, float], Any]:
        """Seconds by clock, of every part by its share, and the outputs of the last part."""
        total: dict[str, float] = {}
        outputs = None
        for part, share in self._parts:
            outputs = None  # freed first, as above
            seconds, outputs = self._once(part)
            for clock, value in seconds.items():
                total[clock] = total.get(clock, 0.0) + share * value
        return total, outputs

    def _once(self, call: Call) -> tuple[dict[str, float], Any]:
        if not self._gpu:
            cpu, start = time.process_time(), time.perf_counter()
            outputs = call()
            wall = time.perf_counter() - start
            return {"wall": wall, "cpu": time.process_time() - cpu}, outputs
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        before.record()
        outputs = call()
        after.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - start
        return {"wall": wall, "host": host, "device": before.elapsed_time(after) / 1e3}, outputs

    def _from_full_queue(self) -> tuple[float, Any]:
        """Seconds on the device, and the outputs."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(min(1.5 * self._host_estimate + 50e-6, 0.05) * _SLEEP_CYCLES_PER_SECOND))
        before.record()
        outputs = self._parts[0][0]()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3, outputs


def measure(
    call: Call, device: torch.device, *, seconds: float = 0.5, least: int = 5, most: int = 200
) -> tuple[Timing, Any]:
    """Time `call` for about `seconds`, in `least` to `most` rounds; the timing and the outputs of the last round.

    The warm-up takes another fifth of the time. The garbage collector is off meanwhile.
    """
    sampler = Sampler(call, device)
    with without_garbage_collection():
        sampler.warm_up(seconds / 5)
        start, outputs = time.perf_counter(), None
        for number in range(most):
            outputs = None
            outputs = sampler.round()
            if number + 1 >= least and time.perf_counter() - start >= seconds:
                break
    return sampler.timing(), outputs


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python's collector off, as it was before afterwards."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory of tensors that one call holds above what is allocated before it, its outputs included.

    By the allocator on a GPU; on a CPU by PyTorch's profiler, which sees what operators allocate in this process. None
    for other devices.
    """
    if device.type == "cpu":
        return _profiled_peak(call)
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _profiled_peak(call: Call) -> int:
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        outputs = call()
    del outputs
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler writes there whenever it starts and stops, past Python, and cannot be told not to."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@functools.cache
def reuse_memory() -> None:
    """Let glibc keep freed memory from now on, so that no call has its large results paged in anew.

    By default every block of 32 MiB and more is mapped when it is allocated, and writing to it first costs a page fault
    each 4 KiB: as much for every peer, and several times what operators take. Nothing happens elsewhere.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
