"""How a folded network is run: operator by operator, compiled, or as CUDA graphs.

A CUDA graph replays a fixed sequence of kernels on fixed memory, so there is one for each batch size. They are captured
on first use, after a warm-up outside the graph (kernels are loaded, compiled and chosen then, which a capture forbids),
and the ones used least recently are given up beyond a limit. All share one memory pool: they never run at the same
time, and what one leaves there is copied out before the next. Threads take turns, and where their streams differ, an
event keeps the order.

Shapes never change within a graph, so cuDNN tries its convolutions for them in the warm-up and keeps the fastest
(`torch.backends.cudnn.benchmark`), unless deterministic algorithms were asked for. A convolution that the thread has
run before without trials keeps what was chosen then: PyTorch keeps its choice by the convolution alone.

A graph keeps the arithmetic it was captured with, so float32 is captured in full fp32: `dtype="float32"` would else
mean TF32 or not by what a switch of the process was at the first call.
"""

import contextlib
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
of them: the caller's to keep."""
Finish = Callable[[Tensor], tuple[Tensor, ...]]
"""What is done with the images as a part of the evaluation; always the same object for the same thing."""
Runner = Callable[[Tensor, Tensor | None, Finish | None], Any]
"""A `Network`, and what is to be done with its images."""

MAX_GRAPHS = 8
_WARM_UP = 3  # calls before a capture


class Capture(Protocol):
    """Makes a function of inputs of one shape out of one for all."""

    def __call__(self, network: Callable[..., Any], *inputs: Tensor | None) -> Callable[..., Any]:
        """What replays `network(*inputs)` on other inputs of their shapes; its results are the caller's to keep."""
        ...

    def drain(self) -> None:
        """Return once nothing that was captured runs any more."""


def choose_engine(engine: Engine, device: torch.device) -> Engine:
    """What "auto" is: "graph" on a GPU; "eager" elsewhere, where a call is cheap beside what it computes.

    Raises ConfigError for an unknown name, BackendError for an engine that cannot run on `device`.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(get_args(Engine))}")
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if engine == "graph" and device.type != "cuda":
        raise BackendError(f"engine 'graph' is CUDA graphs, which cannot run on {device}; use 'eager' or 'compile'")
    return engine


def make_engine(engine: Engine, network: nn.Module, device: torch.device) -> Runner:
    """`network` under `engine`, as `choose_engine` returned it."""
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


class GraphCache:
    """A network that is captured once for every batch size and `Finish`, of which the last `limit` used are kept.

    One thread at a time: a graph's inputs and images lie in memory that all its replays share.
    """

    def __init__(self, network: Network, capture: Capture, limit: int = MAX_GRAPHS) -> None:
        if limit < 1:
            raise ConfigError(f"a cache of graphs holds at least 1, not {limit}")
        self.network = network
        self.capture = capture
        self.limit = limit
        self.graphs: OrderedDict[tuple[int, Finish | None], Network] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, latents: Tensor, rows: Tensor | None, finish: Finish | None = None) -> Any:
        key = len(latents), finish
        with self._lock:
            if key not in self.graphs:
                while len(self.graphs) >= self.limit:
                    self.capture.drain()
                    self.graphs.popitem(last=False)  # before the capture, which can then use its memory
                network = functools.partial(_finished, self.network, finish=finish)
                self.graphs[key] = self.capture(network, latents, rows)
            self.graphs.move_to_end(key)
            return self.graphs[key](latents, rows)


class CudaCapture:
    """Captures CUDA graphs on one device, into one memory pool; float32 as `precision`, a context, has it."""

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
            # a replay on another stream may still use the workspaces that the warm-up's products write to
            self.stream.wait_event(self.idle)
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP):
                    network(*static)
            if not self._alive:  # a pool ends with its last graph, also with one whose capture failed
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
        """Wait for the last replay: a graph and its memory are given up only when they are not in use."""
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
