"""Options and fixtures of the benchmarks under pytest.

pytest benchmarks/ --benchmark-only              small on a CPU; on a GPU every shape and what compiles, hours
pytest benchmarks/ --benchmark-only --small      small there too
pytest benchmarks/ --benchmark-disable -q        checks alone
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.case import OUT_OF_MEMORY, Case, Effort, UnavailableError, measure_peer
from benchmarks.harness.results import FOLDER, Results, Row, format_seconds
from benchmarks.harness.timing import Call, Sampler, Timing, measure

CASES = {
    "operator_case": ("benchmarks.cases.operator_cases", "operator_cases"),
    "network_case": ("benchmarks.cases.network_cases", "network_cases"),
    "training_case": ("benchmarks.cases.training_cases", "training_cases"),
    "pipeline_case": ("benchmarks.cases.pipeline_cases", "pipeline_cases"),
    "waterfall_case": ("benchmarks.cases.waterfall_cases", "waterfall_cases"),
}
"""Fixture names, and where the cases behind them come from: imported only by the run that wants them."""

_ROWS = pytest.StashKey[list[Row]]()
_ROUNDS = 3
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
    """

    def __init__(self, benchmark: Any, device: torch.device, keep: Callable[[Row], None]) -> None:
        self._benchmark, self._device, self._keep = benchmark, device, keep

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
        rows = []
        for peer in bench.peers:
            timer = self._drive if timed and peer == ours[0] else measure
            row = measure_peer(case, bench, peer, self._device, effort, timer)
            if row is not None and (timed or row.failure):
                self._keep(row)
                rows.append(row)
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
