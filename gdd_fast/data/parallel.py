"""Threads for decoding images: Pillow releases the interpreter lock while it works."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 16  # the part that holds the lock saturates earlier


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on a pool of threads, one per core of this process: in order, and only a few results ahead of the consumer.

    The first error in the order of `items` is raised, and nothing more is started.
    """
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    source = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(function, item) for item in islice(source, 4 * threads))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(source, 1))
    finally:
        pool.shutdown(cancel_futures=True)
