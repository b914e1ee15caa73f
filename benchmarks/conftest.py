"""Options and fixtures of the benchmarks under pytest.

pytest benchmarks/ --benchmark-only              small on a CPU; on a GPU every shape and what compiles, hours
pytest benchmarks/ --benchmark-only --small      small there too
pytest benchmarks/ --benchmark-disable -q        checks alone
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.case import COMPILED, OUT_OF_MEMORY, Case, Effort, UnavailableError, measure_peer
from benchmarks.harness.results import FOLDER, Results, Row, format_seconds
from benchmarks.harness.timing import Call, Sampler, Timing, measure, without_garbage_collection

CASES = {
    "operator_case": ("benchmarks.cases.operator_cases", "operator_cases"),
    "network_case": ("benchmarks.cases.network_cases", "network_cases"),
    "training_case": ("benchmarks.cases.training_cases", "training_cases"),
    "pipeline_case": ("benchmarks.cases.pipeline_cases", "pipeline_cases"),
    "waterfall_case": ("benchmarks.cases.waterfall_cases", "waterfall_cases"),
}
"""Fixture names, and where the cases behind them come from: imported only by the run that wants them."""

_ROWS = pytest.StashKey[list[Row]]()
_ROUNDS = 5
_SECONDS = {"wall": 0.3, "device": 0.12}  # by headline: operators take milliseconds, and there are many


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gdd_fast benchmarks")
    group.addoption("--full", action="store_true", default=None, help="every shape and network; default on a GPU")
    group.addoption("--small", action="store_false", dest="full", help="a sample, in fp32; default on a CPU")
    group.addoption("--bench-device", default=None, help="cpu or cuda; default: a GPU if there is one")
    group.addoption("--record", action="store_true", help="keep the rows in benchmarks/results/<device>.json")
    group.addoption("--record-to", type=Path, default=None, metavar="FILE", help="keep the rows in FILE")


def bench_device(config: pytest.Config) -> torch.device:
    """Where the benchmarks run."""
    return torch.device(config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return bench_device(pytestconfig)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config, device: torch.device) -> Iterator[Callable[[Row], None]]:
    """Keeps a row; the file is written at the end of the session, and only if one was asked for."""
    rows = pytestconfig.stash.setdefault(_ROWS, [])
    path = pytestconfig.getoption("--record-to")
    if path is None and pytestconfig.getoption("--record"):
        path = FOLDER / machine.file_name(device)
    results = None if path is None else Results.continued(path, machine.describe(device), machine.rates(device))
    yield rows.append
    if results is not None:
        results.add(rows)
        results.save(path)


class Runner:
    """Runs one case: every peer is checked and timed as everywhere else, and the test fails if one is wrong.

    pytest-benchmark drives the rounds of one peer and shows them: ours if there is one, else the last. It shows whole
    rounds, those of an iteration with all of R1. The times of all peers, in which a sixteenth of it counts, go to
    `extra_info`, to the summary and to the record.

    On a CPU the peers take their rounds in turn: a machine that is shared may run at two thirds of its speed for
    minutes, which would be taken for a peer's own. Compiled ones do not, as they are released before the next begins;
    and none on a GPU, whose memory may not hold all of them at once.
    """

    def __init__(self, benchmark: Any, device: torch.device, keep: Callable[[Row], None]) -> None:
        self._benchmark, self._device, self._keep = benchmark, device, keep
        self._waiting: dict[str, tuple[Sampler, int]] = {}
        """Peers that are checked and warmed up, and how many rounds each is to take."""

    def __call__(self, case: Case) -> None:
        timed = not self._benchmark.disabled
        if case.larger and not timed:
            pytest.skip("a smaller one is checked")
        try:
            bench = case.build(self._device)
        except UnavailableError as error:
            pytest.skip(str(error))
        ours = [name for name in bench.peers if "gdd_fast" in name] or list(bench.peers)
        effort = Effort(_SECONDS[bench.headline] if timed else 0.0, least=_ROUNDS)
        in_turn = timed and self._device.type == "cpu"
        found = {}
        for peer in bench.peers:
            alone = any(name in peer for name in COMPILED)
            timer = partial(self._wait, peer) if in_turn and not alone else self._drive if peer == ours[0] else measure
            row = measure_peer(case, bench, peer, self._device, effort, timer if timed else measure)
            if row is not None and (timed or row.failure):
                found[peer] = row
        timings = self._in_turn(ours[0])
        rows = [row if row.failure else replace(row, **vars(timings.get(p, row))) for p, row in found.items()]
        for row in rows:
            self._keep(row)
        self._benchmark.extra_info["seconds"] = {row.peer: row.seconds for row in rows}
        if not timed:
            self._benchmark(lambda: None)  # the fixture asks to be used
        failed = [f"{row.peer}: {row.failure}" for row in rows if row.failure and row.failure != OUT_OF_MEMORY]
        if failed:
            pytest.fail(f"{case}: " + "; ".join(failed))

    def _drive(self, call: Call, device: torch.device, *, seconds: float, least: int, most: int) -> tuple[Timing, Any]:
        """As `timing.measure`, the rounds by pytest-benchmark."""
        sampler = Sampler(call, device)
        shortest = sampler.warm_up(seconds / 5)
        outputs = self._benchmark.pedantic(sampler.round, rounds=max(least, min(most, int(seconds / shortest))))
        return sampler.timing(), outputs

    def _wait(
        self, peer: str, call: Call, device: torch.device, *, seconds: float, least: int, most: int
    ) -> tuple[Timing, Any]:
        """As `timing.measure`, with one round now and all others in turn with the other peers'."""
        sampler = Sampler(call, device)
        shortest = sampler.warm_up(seconds / 5)
        outputs = sampler.round()
        self._waiting[peer] = (sampler, max(least, min(most, int(seconds / shortest))))
        return sampler.timing(), outputs

    def _in_turn(self, driven: str) -> dict[str, Timing]:
        """The timings of the peers that wait, after their rounds; pytest-benchmark drives those of `driven`."""
        others = [waiting for peer, waiting in self._waiting.items() if peer != driven]

        def turns() -> Iterator[None]:
            for number in range(max((rounds for _, rounds in others), default=0)):
                # each time another one is last: whoever follows a peer with threads of its own may wait for these
                first = number % len(others)
                for sampler, rounds in others[first:] + others[:first]:
                    if number < rounds:
                        sampler.round()
                yield

        turn = turns()
        with without_garbage_collection():
            if driven in self._waiting:
                sampler, rounds = self._waiting[driven]
                self._benchmark.pedantic(sampler.round, setup=lambda: next(turn, None), rounds=rounds)
            for _ in turn:
                pass
        return {peer: sampler.timing() for peer, (sampler, _) in self._waiting.items()}


@pytest.fixture
def run_case(benchmark: Any, device: torch.device, record: Callable[[Row], None]) -> Runner:
    return Runner(benchmark, device, record)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `operator_case`, `network_case`, ... run once per case."""
    for name in CASES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, cases_for(name, metafunc.config), ids=str)


def cases_for(name: str, config: pytest.Config) -> list[Case]:
    """The cases behind a fixture of `CASES`; the full ones end with those of peers that have to be compiled."""
    full = config.getoption("--full")
    full = bench_device(config).type == "cuda" if full is None else full
    module, function = CASES[name]
    module = importlib.import_module(module)
    compiled = getattr(module, "compiled_cases", list)() if full else []
    return [*getattr(module, function)(full), *compiled]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """All peers of all cases, the part of the record that fits on a screen."""
    rows = config.stash.get(_ROWS, [])
    for case in dict.fromkeys((row.group, row.case) for row in rows):
        times = [f"{r.peer} {format_seconds(r.seconds)}" for r in rows if (r.group, r.case) == case]
        terminalreporter.write_line(f"{case[0]}, {case[1]}: {', '.join(times)}")
