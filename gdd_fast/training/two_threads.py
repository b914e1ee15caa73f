"""Runs two halves of an iteration at once on a CPU, each on half of the cores.

Small networks gain little from a second core within an operator, as threads synchronise at the end of each. Two
independent parts of an iteration keep both cores busy with operators of their own. What one computes does not depend on
when the other runs, so results are the same each time.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


class TwoThreads:
    """A second thread to compute in. From the first `start` on, each of the two has half of `torch.get_num_threads()`.

    That number applies to the whole process: `close` restores it.
    """

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._half = max(1, self._all // 2)
        self._other: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None

    def start(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` in the other thread, after its earlier work; `result()` waits for it and raises its errors."""
        if self._other is None:
            torch.set_num_threads(self._half)
            # OpenMP keeps a number for each thread
            share = {"initializer": torch.set_num_threads, "initargs": (self._half,)}
            self._other = ThreadPoolExecutor(1, thread_name_prefix="second", **share)
        started = self._last = self._other.submit(work)
        return started

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For a block, give this thread all cores, once the other has finished its work."""
        if self._last is not None:
            wait([self._last])
        before = torch.get_num_threads()
        torch.set_num_threads(self._all)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Wait for the other thread and end it."""
        if self._other is not None:
            self._other.shutdown()
            torch.set_num_threads(self._all)
            self._other = self._last = None


def at_once(beside: Callable[[], S], here: Callable[[], T], device: torch.device) -> tuple[S, T]:
    """The results of two independent functions: run at the same time if PyTorch has several threads on a CPU."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return beside(), here()
    two = TwoThreads()
    try:
        other = two.start(beside)
        mine = here()
        return other.result(), mine
    finally:
        two.close()
