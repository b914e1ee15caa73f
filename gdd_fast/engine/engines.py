"""How a folded network runs: operator by operator, compiled, or as CUDA graphs.

A CUDA graph replays a fixed sequence of kernels on fixed memory, so there is one for each batch size. Graphs are
captured on first use, after a warm-up that loads, compiles and chooses kernels, which a capture forbids; beyond a
limit, the least recently used are dropped. A batch size that was dropped `MOST_DROPS` times runs operator by operator
from then on: a capture takes longer than several calls. All graphs share one memory pool: they never run at the same
time, and the results of one are copied out before the next runs. Threads take turns; where their streams differ, an
event keeps the order.

Shapes never change within a graph, so in the warm-up cuDNN times its algorithms for them and keeps the fastest
(`torch.backends.cudnn.benchmark`), unless deterministic algorithms were requested. A convolution that the thread
already ran without timing keeps its earlier algorithm: PyTorch caches the choice by the convolution alone.

A graph keeps the arithmetic it was captured with, so float32 is captured in full fp32: otherwise a process-wide switch
would decide at the first call whether `dtype="float32"` means TF32.
"""

import contextlib
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gdd_fast.backend import has_extension
from gdd_fast.device import full_float32
from gdd_fast.engine.recorded import Recorded
from gdd_fast.errors import BackendError, ConfigError

Engine = Literal["auto", "eager", "compile", "graph"]
Network = Callable[[Tensor, Tensor | None], Any]
"""(latents float32 (N, C, H, W), rows float32 (N, R) or None) -> images float32 (N, C, H, W), or what a `Finish` makes
of them. The caller owns the result."""
Finish = Callable[[Tensor], tuple[Tensor, ...]]
"""Postprocesses the images as part of the evaluation. It is part of a cache key, so pass the same object each time."""
Runner = Callable[[Tensor, Tensor | None, Finish | None], Any]
"""A `Network` that takes a `Finish` for its images too."""

MAX_GRAPHS = 8
MOST_DROPS = 2
MOST_KINDS = 256
"""How many kinds of call are remembered that have no graph."""
_WARM_UP = 3  # calls before a capture


class Capture(Protocol):
    """Specialises a function to inputs of one shape."""

    def __call__(self, network: Callable[..., Any], *inputs: Tensor | None) -> Callable[..., Any]:
        """A function that replays `network(*inputs)` on other inputs of these shapes. The caller owns its results."""
        ...

    def drain(self) -> None:
        """Return once nothing that was captured is still running."""


def choose_engine(engine: Engine, device: torch.device) -> Engine:
    """`engine`, with "auto" resolved: "graph" on a GPU, "eager" elsewhere, where launching is cheap next to computing.

    Raises ConfigError for an unknown name, BackendError for an engine that cannot run on `device`.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(get_args(Engine))}")
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if engine == "graph" and device.type != "cuda":
        raise BackendError(f"engine 'graph' needs CUDA and cannot run on {device}; use 'eager' or 'compile'")
    return engine


def make_engine(engine: Engine, network: nn.Module, device: torch.device) -> Runner:
    """A function that runs `network` by `engine`, as `choose_engine` returned it."""
    match engine:
        case "compile":
            return functools.partial(_finished, torch.compile(network))
        case "graph":
            return GraphCache(network, CudaCapture(device))
        case _:
            if device.type == "cpu" and isinstance(network, nn.Module) and has_extension():
                return Recorded(network)
            return functools.partial(_finished, network)


def _finished(network: Network, latents: Tensor, rows: Tensor | None, finish: Finish | None = None) -> Any:
    images = network(latents, rows)
    return images if finish is None else finish(images)


class Drops:
    """How often the graph of a kind was given up for others', by kind; the last `MOST_KINDS` are remembered."""

    def __init__(self) -> None:
        self._times: OrderedDict[Hashable, int] = OrderedDict()

    def note(self, kind: Hashable) -> None:
        self._times[kind] = self._times.pop(kind, 0) + 1
        if len(self._times) > MOST_KINDS:
            self._times.popitem(last=False)

    def too_many(self, kind: Hashable) -> bool:
        """Whether it should have no graph again: it takes turns with more kinds than are kept."""
        return self._times.get(kind, 0) >= MOST_DROPS


class GraphCache:
    """A network that is captured once per batch size and `Finish`; the `limit` most recently used graphs are kept.

    Threads take turns, as all replays of a graph share the memory of its inputs and images.
    """

    def __init__(self, network: Network, capture: Capture, limit: int = MAX_GRAPHS) -> None:
        if limit < 1:
            raise ConfigError(f"limit must be at least 1, not {limit}")
        self.network = network
        self.capture = capture
        self.limit = limit
        self.graphs: OrderedDict[tuple[int, Finish | None], Network] = OrderedDict()
        self._drops = Drops()
        self._lock = threading.Lock()

    def __call__(self, latents: Tensor, rows: Tensor | None, finish: Finish | None = None) -> Any:
        key = len(latents), finish
        with self._lock:
            if key not in self.graphs:
                network = functools.partial(_finished, self.network, finish=finish)
                if self._drops.too_many(key):
                    with full_float32():  # as in a graph
                        return network(latents, rows)
                while len(self.graphs) >= self.limit:
                    self.capture.drain()
                    dropped, _ = self.graphs.popitem(last=False)  # before the capture, which can then reuse its memory
                    self._drops.note(dropped)
                self.graphs[key] = self.capture(network, latents, rows)
            self.graphs.move_to_end(key)
            return self.graphs[key](latents, rows)


class CudaCapture:
    """Captures CUDA graphs on one device, into one memory pool, within the context `precision`, which sets
    float32's."""

    def __init__(
        self, device: torch.device, precision: Callable[[], contextlib.AbstractContextManager] = full_float32
    ) -> None:
        self.device = device
        self.precision = precision
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.idle = torch.cuda.Event()  # after the last replay and the copy of its result
        self.pool: tuple[int, int] | None = None
        self._alive: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

    def __call__(self, network: Callable[..., Any], *inputs: Tensor | None) -> Callable[..., Any]:
        static = [None if t is None else t.clone() for t in inputs]
        with torch.cuda.device(self.device), _fastest_convolutions(), self.precision():
            self.stream.wait_stream(torch.cuda.current_stream())
            # a replay on another stream may still use workspaces that matrix products of the warm-up write to
            self.stream.wait_event(self.idle)
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP):
                    network(*static)
            if not self._alive:  # a pool ends with its last graph, even one whose capture failed
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads may go on calling CUDA: they copy images while this one captures
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
                results = network(*static)
            torch.cuda.current_stream().wait_stream(self.stream)

        def replay(*given: Tensor | None) -> Any:
            with torch.cuda.device(self.device):
                torch.cuda.current_stream().wait_event(self.idle)  # the last replay may be on another stream
                for own, new in zip(static, given, strict=True):
                    if own is not None and new is not None:
                        own.copy_(new)
                graph.replay()
                kept = tree_map_only(Tensor, torch.clone, results)
                self.idle.record()
            return kept

        self._alive.add(replay)
        return replay

    def drain(self) -> None:
        """Wait for the last replay: a graph may be dropped, and its memory reused, only when it is not running."""
        self.idle.synchronize()


@contextlib.contextmanager
def _fastest_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or not (
        torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    )
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
