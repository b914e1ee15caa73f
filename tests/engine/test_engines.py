"""Engines: which one runs where, the cache of graphs, the rules of captures and of copies to the host."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from gdd_fast.engine.engines import MOST_DROPS, MOST_KINDS, CudaCapture, Drops, GraphCache, choose_engine, make_engine
from gdd_fast.engine.one_step import _device
from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.sampling.generate import Batch, to_host

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


class Recorder:
    """Stands for CudaCapture: counts captures, and refuses inputs of another shape than those it captured."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.drained = 0

    def drain(self) -> None:
        self.drained += 1

    def __call__(self, network, latents: Tensor, rows: Tensor | None):
        self.captured.append(len(latents))
        shapes = latents.shape, None if rows is None else rows.shape

        def replay(latents: Tensor, rows: Tensor | None) -> Tensor:
            assert (latents.shape, None if rows is None else rows.shape) == shapes
            return network(latents, rows)

        return replay


def add(latents: Tensor, rows: Tensor | None) -> Tensor:
    return latents + (0 if rows is None else rows.sum())


def test_auto_and_names() -> None:
    assert choose_engine("auto", CPU) == "eager"
    assert choose_engine("auto", GPU) == "graph"
    assert choose_engine("compile", CPU) == "compile"
    with pytest.raises(BackendError, match="graph"):
        choose_engine("graph", CPU)
    with pytest.raises(ConfigError, match="engine"):
        choose_engine("fast", CPU)
    z = torch.ones(2, 2)
    assert torch.equal(make_engine("eager", add, CPU)(z, None), z)
    assert torch.equal(make_engine("eager", add, CPU)(z, None, lambda images: (images, images + 1))[1], z + 1)


def test_a_graph_is_captured_once_a_batch_size() -> None:
    capture = Recorder()
    cache = GraphCache(add, capture, limit=3)
    for batch in (1, 4, 1, 4, 1):
        x, rows = torch.full((batch, 2), float(batch)), torch.ones(batch, 3)
        assert torch.equal(cache(x, rows), x + 3 * batch)
    assert capture.captured == [1, 4]


def test_what_is_done_with_the_images_is_a_part_of_the_graph() -> None:
    def bytes_of(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(torch.uint8), images.isfinite().all()

    captured = []

    def capture(network, latents: Tensor, rows: Tensor | None):
        captured.append(network(latents, rows))
        return network

    cache = GraphCache(add, capture)
    z = torch.full((2, 2), 3.7)
    for _ in range(2):
        images, finite = cache(z, None, bytes_of)
        assert images.dtype == torch.uint8 and images.eq(3).all() and bool(finite)
        assert torch.equal(cache(z, None), z)
    assert [type(result) for result in captured] == [tuple, Tensor], "once each, with what is done last in it"


def test_a_replay_gives_all_its_results_memory_of_their_own() -> None:
    with FakeCuda() as cuda:
        network = CudaCapture(GPU)(lambda z, rows: (cuda.doubled(z, rows), z.isfinite().all()), torch.ones(2, 2), None)
        (first, finite), (second, _) = network(torch.full((2, 2), 3.0), None), network(torch.full((2, 2), 5.0), None)
        assert (first == 6).all() and (second == 10).all() and bool(finite)


def test_the_graph_used_least_recently_goes_first() -> None:
    capture = Recorder()
    cache = GraphCache(add, capture, limit=2)
    for batch in (1, 2, 1, 3):  # 3 takes the place of 2
        cache(torch.zeros(batch, 2), None)
    assert list(cache.graphs) == [(1, None), (3, None)]
    cache(torch.zeros(1, 2), None)
    assert capture.captured == [1, 2, 3]
    cache(torch.zeros(2, 2), None)
    assert capture.captured == [1, 2, 3, 2]
    assert list(cache.graphs) == [(1, None), (2, None)]
    assert capture.drained == 2, "what is given up must not be running"


def test_batch_sizes_that_take_turns_beyond_the_limit_are_not_captured_for_ever() -> None:
    capture = Recorder()
    cache = GraphCache(add, capture, limit=2)
    for turn in range(20):
        for batch in (1, 2, 3):
            x = torch.full((batch, 2), float(turn))
            assert torch.equal(cache(x, torch.ones(batch, 3)), x + 3 * batch)
    assert len(capture.captured) <= 3 * MOST_DROPS + 2
    assert len(cache.graphs) == 2, "one of the three runs as it is, and the others keep their graphs"


def test_kinds_that_were_given_up_are_not_remembered_for_ever() -> None:
    drops = Drops()
    for _ in range(MOST_DROPS):
        drops.note("first")
    assert drops.too_many("first") and not drops.too_many("other")
    for kind in range(MOST_KINDS):
        drops.note(kind)
    assert not drops.too_many("first") and len(drops._times) == MOST_KINDS


def test_a_capture_that_fails_is_tried_again() -> None:
    failures = iter([RuntimeError("out of memory")])

    def capture(network, latents, rows):
        for failure in failures:
            raise failure
        return network

    cache = GraphCache(add, capture, limit=1)
    with pytest.raises(RuntimeError, match="memory"):
        cache(torch.zeros(2, 2), None)
    assert torch.equal(cache(torch.ones(2, 2), None), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="at least 1"):
        GraphCache(add, capture, limit=0)


def test_threads_take_turns() -> None:
    captured = []

    def capture(network, latents: Tensor, rows: Tensor | None):
        captured.append(len(latents))
        static = latents.clone()  # as a graph's, shared by all its replays

        def replay(latents: Tensor, rows: Tensor | None) -> Tensor:
            static.copy_(latents)
            time.sleep(1e-3)
            return static.clone()

        return replay

    cache = GraphCache(add, capture)
    inputs = [torch.full((1 + i % 2, 2), float(i)) for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda x: cache(x, None), inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, results, strict=True))
    assert sorted(captured) == [1, 2]


class FakeCuda:
    """A device that runs things when they are asked for, and notes in which order and on which stream that was."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = ["main"]
        self.recorded: list[Callable[[], None]] | None = None

    def __enter__(self) -> "FakeCuda":
        fakes = {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda: self.stream_object("side"),
            "current_stream": lambda device=None: self.stream_object(self.streams[-1]),
            "stream": lambda stream: self.on(stream.name),
            "Event": self.event,
            "CUDAGraph": self.graph_object,
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 1),
        }
        self.patch = mock.patch.multiple("torch.cuda", **fakes)
        self.patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.stop()

    def note(self, what: str) -> None:
        self.log.append(f"{self.streams[-1]}: {what}")

    def stream_object(self, name: str) -> SimpleNamespace:
        wait = lambda what: self.log.append(f"{name}: wait for {what.name}")
        return SimpleNamespace(name=name, wait_stream=wait, wait_event=wait)

    def event(self) -> SimpleNamespace:
        return SimpleNamespace(
            name="idle", record=lambda: self.note("record idle"), synchronize=lambda: self.note("synchronize")
        )

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        self.streams.append(name)
        yield
        self.streams.pop()

    def graph_object(self) -> SimpleNamespace:
        graph = SimpleNamespace(steps=[])

        def replay() -> None:
            self.note("replay")
            for step in graph.steps:
                step()

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "others may copy images meanwhile"
        with self.on(stream.name):
            self.note("capture")
            self.recorded = graph.steps
            yield
            self.recorded = None

    def doubled(self, latents: Tensor, rows: Tensor | None) -> Tensor:
        """A network: while it is captured nothing is computed, and a replay reads and writes the same memory."""
        result = torch.full_like(latents, torch.nan)
        step = lambda: torch.add(latents, latents, out=result)
        self.note("record" if self.recorded is not None else "run")
        self.recorded.append(step) if self.recorded is not None else step()
        return result


def test_a_capture_follows_the_rules_and_replays_give_their_own_memory() -> None:
    with FakeCuda() as cuda:
        network = CudaCapture(GPU)(cuda.doubled, torch.ones(2, 2), None)
        warm_up = ["side: wait for main", "side: wait for idle", *["side: run"] * 3]
        assert cuda.log == [*warm_up, "side: capture", "side: record", "main: wait for side"]
        cuda.log.clear()
        given = torch.full((2, 2), 3.0)
        first = network(given, None)
        assert cuda.log == ["main: wait for idle", "main: replay", "main: record idle"]
        second = network(torch.full((2, 2), 5.0), None)
        assert (first == 6).all() and (second == 10).all() and (given == 3).all()
        with torch.inference_mode():
            assert (network(given, None) == 6).all()


def test_convolutions_are_tried_in_the_warm_up_alone(monkeypatch) -> None:
    seen: list[bool] = []

    def network(latents: Tensor, rows: Tensor | None) -> Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return latents

    with FakeCuda():
        assert not torch.backends.cudnn.benchmark
        CudaCapture(GPU)(network, torch.ones(1), None)
        assert seen == [True] * 4 and not torch.backends.cudnn.benchmark
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        CudaCapture(GPU)(network, torch.ones(1), None)
        assert not any(seen[4:])


def test_float32_is_captured_in_full_whatever_the_process_chose(switches) -> None:
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    seen: list[set[str]] = []

    def network(latents: Tensor, rows: Tensor | None) -> Tensor:
        seen.append({kind.fp32_precision for kind in kinds})
        return latents

    for kind in kinds:
        kind.fp32_precision = "tf32"
    with FakeCuda():
        CudaCapture(GPU)(network, torch.ones(1), None)
    assert seen == [{"ieee"}] * 4 and [kind.fp32_precision for kind in kinds] == ["tf32"] * 2


def test_what_is_given_up_is_freed() -> None:
    with FakeCuda() as cuda:
        capture = CudaCapture(GPU)
        cache = GraphCache(cuda.doubled, capture, limit=2)
        for batch in (1, 2, 3):
            cache(torch.ones(batch, 2), None)
        assert len(capture._alive) == 2, "by reference counting alone, at once"
        del cache
        assert not capture._alive


def test_copies_to_the_host_are_waited_for_when_their_turn_comes() -> None:
    log: list[str] = []

    class Pinned:
        def __init__(self, shape, *, dtype, pin_memory: bool) -> None:
            assert pin_memory

        def copy_(self, source: SimpleNamespace, *, non_blocking: bool) -> "Pinned":
            assert non_blocking
            log.append(f"copy {source.name}")
            return self

    def event() -> SimpleNamespace:
        number = sum(entry.startswith("record") for entry in log)
        return SimpleNamespace(
            record=lambda stream: log.append(f"record {number} on {stream}"),
            synchronize=lambda: log.append(f"wait for {number}"),
        )

    on_gpu = lambda name: SimpleNamespace(name=name, is_cuda=True, shape=(1,), dtype=torch.uint8, device="cuda:1")
    batches = (Batch([i], on_gpu(f"images {i}"), None, on_gpu(f"finite {i}")) for i in range(3))
    with (
        mock.patch("torch.empty", Pinned),
        mock.patch("torch.cuda.Event", event),
        mock.patch("torch.cuda.current_stream", lambda device: f"the stream of {device}"),
    ):
        for batch in to_host(batches, ahead=1):
            assert isinstance(batch.images, Pinned) and batch.classes is None
            log.append(f"use {batch.seeds[0]}")
    copies = [[f"copy images {i}", f"copy finite {i}", f"record {i} on the stream of cuda:1"] for i in range(3)]
    uses = [[f"wait for {i}", f"use {i}"] for i in range(3)]
    assert log == [*copies[0], *copies[1], *uses[0], *copies[2], *uses[1], *uses[2]]


def test_a_device_has_a_number(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_device(name) for name in ("cuda", "cuda:0", "cpu")] == [GPU, torch.device("cuda:0"), CPU]
    with pytest.raises(ConfigError, match="only 2 CUDA devices"):
        _device("cuda:2")


def test_a_memory_pool_is_used_while_one_of_its_graphs_lives() -> None:
    names = ("device", "Stream", "Event", "CUDAGraph", "graph", "stream", "current_stream", "graph_pool_handle")
    with mock.patch.multiple("torch.cuda", **{name: mock.MagicMock() for name in names}):
        torch.cuda.graph_pool_handle.side_effect = [(0, i) for i in range(9)]
        pools = lambda: [call.kwargs["pool"][1] for call in torch.cuda.graph.call_args_list]
        capture = CudaCapture(GPU)
        torch.cuda.graph.side_effect = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="memory"):
            capture(add, torch.zeros(1, 2), None)
        torch.cuda.graph.side_effect = None
        torch.cuda.graph.return_value = mock.MagicMock(__exit__=mock.Mock(return_value=None))
        kept = [capture(add, torch.zeros(n, 2), None) for n in (1, 2)]
        assert pools() == [0, 1, 1]
        kept.clear()
        capture(add, torch.zeros(3, 2), None)
        assert pools() == [0, 1, 1, 2]
