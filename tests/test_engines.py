"""Engines: which one runs where, and the cache of graphs with the capture replaced."""

import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor

from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.inference.engines import CudaCapture, GraphCache, choose_engine, make_engine

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


class Recorder:
    """Stands for CudaCapture: counts captures, and refuses inputs of another shape than those it captured."""

    def __init__(self) -> None:
        self.captured: list[int] = []

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
    assert make_engine("eager", add, CPU) is add


def test_a_graph_is_captured_once_a_batch_size() -> None:
    capture = Recorder()
    cache = GraphCache(add, capture, limit=3)
    for batch in (1, 4, 1, 4, 1):
        x, rows = torch.full((batch, 2), float(batch)), torch.ones(batch, 3)
        assert torch.equal(cache(x, rows), x + 3 * batch)
    assert capture.captured == [1, 4]


def test_the_graph_used_least_recently_goes_first() -> None:
    capture = Recorder()
    cache = GraphCache(add, capture, limit=2)
    for batch in (1, 2, 1, 3):  # 3 takes the place of 2
        cache(torch.zeros(batch, 2), None)
    assert list(cache.graphs) == [1, 3]
    cache(torch.zeros(1, 2), None)
    assert capture.captured == [1, 2, 3]
    cache(torch.zeros(2, 2), None)
    assert capture.captured == [1, 2, 3, 2]
    assert list(cache.graphs) == [1, 2]


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
