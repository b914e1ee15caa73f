"""CPU operators beside what PyTorch offers for the same work: parity first, then time, memory and bandwidth.

    pytest benchmarks/test_resample2d.py --benchmark-only            smoke: small shapes
    pytest benchmarks/test_resample2d.py --benchmark-only -m slow    the shapes that figures are stated for

All peers of a case run in one process, one after the other, and stand in one group of the table. A peer whose result is
wrong fails before it is timed. OMP_NUM_THREADS sets the threads, of PyTorch's operators and ours alike.
"""

import ctypes
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of mallopt(3)


def timed(
    benchmark: Any,
    group: str,
    call: Callable[[], Any],
    check: Callable[[], None],
    *,
    moved: int | None = None,
    least_seconds: float = 0.2,
) -> None:
    """Check, then time `call` in `group`; `extra_info` gets the peak memory and the share of the copy bandwidth.

    `moved`: bytes that have to be read and written at least; the share is `moved` a second, of the least time, over
    what a plain copy of as many bytes moves.
    """
    check()
    reuse_memory()
    benchmark.group = group
    call()  # an optimizer makes its state
    benchmark.extra_info["peak_mib"] = round(peak_bytes(call) / 2**20, 2)
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    benchmark.pedantic(call, rounds=max(5, min(200, int(least_seconds / once))), warmup_rounds=2)
    if moved is not None and benchmark.stats is not None:  # None with --benchmark-disable
        share = moved / benchmark.stats.stats.min / copy_bandwidth(moved)
        benchmark.extra_info["share_of_copy"] = round(share, 3)


def reuse_memory() -> None:
    """Let glibc keep freed memory, so that a large result is not paged in anew by every call.

    By default every block of 32 MiB and more is mapped when it is allocated, and writing to it first costs a page fault
    each 4 KiB: as much for every peer, and several times what the operators take. A no-op elsewhere.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache
def copy_bandwidth(moved: int) -> float:
    """Bytes a second that `Tensor.copy_` moves when it reads half of `moved` and writes the other half."""
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 8 * source.numel() / best


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory of tensors that a call held at once, over what was held before; its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def assert_as_accurate(got: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """The parity rule: an error of at most twice stock PyTorch's in the same dtype, both against float64."""
    for ours, theirs, want in zip(got, stock, exact, strict=True):
        assert ours.shape == want.shape and ours.dtype == theirs.dtype
        error, allowed = ((t.double() - want).abs().max().item() for t in (ours, theirs))
        floor = torch.finfo(ours.dtype).eps * want.abs().max().item()
        assert error <= 2 * allowed + floor, f"error {error:.2e}, stock's {allowed:.2e}: no time is taken"
