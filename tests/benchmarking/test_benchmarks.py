"""The benchmarks' own promises: no time for what is wrong, an honest record, regressions found, tables that agree."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest
from benchmarks.harness import case, machine, timing
from benchmarks.harness.case import OUT_OF_MEMORY, Bench, Case, Effort, UnavailableError, measure_case
from benchmarks.harness.checks import Accuracy, Closeness, MismatchError, poisoned
from benchmarks.harness.results import Results, Row, format_seconds
from benchmarks.harness.timing import Sampler, WithParts, measure, peak_bytes
from benchmarks.reports import compare, tables

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUICK = Effort(0.001, least=2, most=3)
MACHINE = {"device": "d", "type": "cpu", "cores": 2, "versions": {"torch": "2"}, "commit": "c", "date": "2026-01-01"}
RATES = {"copy": 1e9, "fp32": 1e12}


def results(*rows):
    return Results(MACHINE, RATES, rows)


def row(peer="gdd_fast", wall=(0.9, 1.0, 1.1), **more):
    return Row("generator", "n", peer, rounds=5, wall=list(wall), **more)


def test_measure_runs_the_rounds_asked_for_and_returns_the_last_outputs():
    calls = []
    timing, outputs = measure(lambda: calls.append(None) or len(calls), CPU, seconds=0, least=4, most=9)
    assert timing.rounds == 4 and outputs == len(calls) >= 4
    assert 0 < timing.wall[0] <= timing.wall[1] <= timing.wall[2]
    assert timing.cpu is not None and timing.device is None


def test_parts_of_a_call_are_timed_by_their_shares(monkeypatch):
    """A clock that only the parts move, by 1 and by 4 seconds."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: 2 * clock[0])

    def part(seconds):
        clock[0] += seconds
        return seconds

    call = WithParts([(partial(part, 1.0), 1.0), (partial(part, 4.0), 1 / 16)])
    assert call() == 4.0 and clock == [5.0]
    timed, outputs = measure(call, CPU, seconds=0, least=3)
    assert timed.wall == [1.25] * 3 and timed.cpu == [2.5] * 3 and outputs == 4.0


def test_a_sampler_leaves_its_warm_up_out():
    sampler = Sampler(lambda: None, CPU)
    sampler.warm_up(0)
    sampler.round()
    assert sampler.timing().rounds == 1


def test_memory_is_poisoned_and_the_setting_put_back():
    with poisoned(CPU):
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "wrong", [lambda y: y + 1e-3, lambda y: y * float("nan"), lambda y: y[:-1], lambda y: y.half()]
)
def test_accuracy_takes_eager_torch_and_nothing_worse(wrong):
    x = torch.rand(1000) + 1
    accuracy = Accuracy(x.double().log().exp(), x.log().exp())
    accuracy.check(x.log().exp())
    with pytest.raises(MismatchError):
        accuracy.check(wrong(x))


def test_closeness_allows_twice_the_error_of_eager():
    truth = torch.ones(100)
    closeness = Closeness([truth], 1e-3, [truth * 1.01])
    closeness.check([truth * 1.019])
    with pytest.raises(MismatchError):
        closeness.check([truth * 1.021])
    with pytest.raises(MismatchError):
        Closeness([truth], 1e-3, [truth * 9]).check([truth * 0])  # however bad eager is


def test_where_eager_is_rounding_alone_only_the_norm_is_compared():
    """Two gradients that share nothing but their size, as bf16 brings them back through many ReLUs."""
    truth, eager, ours = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    closeness = Closeness([truth], 0.1, [eager])
    closeness.check([eager])
    closeness.check([ours])
    for wrong in (0 * ours, 0.4 * ours, 2.1 * eager, float("nan") * ours):
        with pytest.raises(MismatchError):
            closeness.check([wrong])


@pytest.mark.parametrize("stale", ["from the start", "later"])
def test_a_replay_that_writes_nothing_is_found(stale):
    own = torch.ones(3)

    def replay():
        if stale == "later" and len(calls) < 3:
            own.fill_(1.0)
        calls.append(None)
        return own

    calls, replay.own_outputs = [], own
    right = Closeness(torch.ones(3), 1e-6).check
    (only,) = measure_case(Case("g", "c", lambda device: Bench({"graph": lambda: replay}, right)), CPU, QUICK)
    assert "NaN" in only.failure and only.wall is None


def test_a_peer_that_is_wrong_gets_no_time_and_the_others_do():
    """Also one that goes wrong later, one that raises, one without memory and one that is not there."""
    x = torch.rand(8)
    later = iter([x, *[x + 1] * 100])

    def absent():
        raise UnavailableError("not installed")

    def no_memory():
        raise torch.OutOfMemoryError("full")

    peers = {
        "unwritten": lambda: lambda: torch.empty(8),
        "later": lambda: lambda: next(later),
        "raises": lambda: lambda: torch.ones(2) + torch.ones(3),
        "absent": absent,
        "large": no_memory,
        "right": lambda: x.clone,
    }
    work = Case("g", "c", lambda device: Bench(peers, Closeness(x, 1e-6).check, bytes=64))
    found = {row.peer: row for row in measure_case(work, CPU, QUICK)}
    assert list(found) == ["unwritten", "later", "raises", "large", "right"]
    assert all(found[p].wall is None and found[p].failure for p in list(found)[:-1])
    assert "NaN" in found["unwritten"].failure and found["large"].failure == OUT_OF_MEMORY
    assert found["right"].failure is None and found["right"].wall and found["right"].bytes == 64


def test_a_case_that_cannot_be_built_is_a_row():
    (only,) = measure_case(Case("g", "c", lambda device: 1 / 0), CPU, QUICK)
    assert only.peer == "-" and "ZeroDivisionError" in only.failure


def test_without_effort_peers_are_checked_and_none_is_timed():
    missing = {"gdd_fast:cpp": "not built"}
    bench = Bench({"a": lambda: lambda: torch.ones(1)}, lambda outputs: None, missing=missing)
    verdicts = {row.peer: row.failure for row in measure_case(Case("g", "c", lambda _: bench), CPU, Effort(0.0))}
    assert verdicts == {"gdd_fast:cpp": "cannot run here: not built", "a": None}
    (row,) = measure_case(Case("g", "c", lambda _: bench), CPU, QUICK)
    assert row.peer == "a" and row.wall


def test_results_survive_a_file_and_replace_rows_of_the_same_key(tmp_path):
    kept = results(row(bytes=7, extra={"a": 1}), Row("g", "c", "p", failure="wrong: 1"))
    kept.notes["n"] = [1]
    kept.add([row(wall=(1, 2, 3))])
    kept.save(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert again.rows == kept.rows and len(again.rows) == 2 and again.notes == kept.notes
    assert (again.machine, again.rates) == (MACHINE, RATES) and again.rows[0].wall == [1, 2, 3]


def test_rows_that_are_not_taken_anew_say_what_commit_they_are_of(tmp_path):
    path = tmp_path / "r.json"
    results(row(), row("stock")).save(path)
    later = Results.continued(path, {**MACHINE, "commit": "later"}, RATES)
    later.add([row("stock")])
    assert [r.extra for r in later.rows] == [{"commit": "c"}, {}]
    assert Results.continued(path, {**MACHINE, "device": "other"}, RATES).rows == []


@pytest.mark.parametrize("change", [{"format": 0}, {"rows": [{"group": "g", "case": "c", "peer": "p", "speed": 1}]}])
def test_a_file_of_another_form_is_refused(tmp_path, change):
    results(row()).save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text()) | change
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"r\.json"):
        Results.load(tmp_path / "r.json")


def test_shares_are_of_the_machines_own_rates():
    r = row(wall=(1, 2, 3), device=[0.4, 0.5, 0.6], headline="device", bytes=10**8, flops=10**11)
    assert r.copy_fraction(RATES) == pytest.approx(0.2) and r.matmul_fraction(RATES) == pytest.approx(0.2)
    assert replace(r, precision="bf16").matmul_fraction(RATES) is None


@pytest.mark.parametrize(
    ("after", "status"),
    [
        ({"wall": (1.2, 1.3, 1.4)}, 1),  # slower beyond both quantiles
        ({"wall": (1.05, 1.3, 1.4)}, 0),  # they overlap: noise
        ({"wall": (0.9, 1.0, 1.1), "peak_bytes": 2000}, 1),
        ({"wall": (0.5, 0.6, 0.7), "peak_bytes": 1000}, 0),
    ],
)
def test_compare_flags_what_is_worse_beyond_the_noise(tmp_path, capsys, after, status):
    results(row(peak_bytes=1000)).save(tmp_path / "a.json")
    results(row(**after)).save(tmp_path / "b.json")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == status
    assert f"1 compared, {status} worse" in capsys.readouterr().out.replace("2 compared", "1 compared")


def test_compare_refuses_a_file_that_is_not_there_in_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("reports.accelerated", ["--rounds", "0"]),
        ("counts.host_cost", ["--rounds", "0"]),
        ("counts.offline_table", ["--sample", "0"]),
        ("counts.gradients", ["--batch", "0"]),
    ],
)
def test_a_command_that_is_asked_for_nothing_says_so_in_one_line(command, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, *flags])
    with pytest.raises(SystemExit) as refusal:
        importlib.import_module(f"benchmarks.{command}").main()
    assert refusal.value.code == 2 and capsys.readouterr().err.rstrip().endswith("must be at least 1")


def test_compare_says_which_rows_are_gone(tmp_path, capsys):
    results(row(), row("stock")).save(tmp_path / "a.json")
    results(row()).save(tmp_path / "b.json")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "1 rows of a.json are not in b.json" in capsys.readouterr().out


def test_compare_takes_a_lost_time_for_worse_and_refuses_other_machines(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    results(row()).save(a)
    results(Row("generator", "n", "gdd_fast", failure="wrong: 1")).save(b)
    assert compare.main([str(a), str(b)]) == 1
    Results({**MACHINE, "device": "other"}, RATES, [row()]).save(b)
    assert compare.main([str(a), str(b)]) == 2
    assert compare.main([str(a), str(b), "--other-machine"]) == 0


def test_tables_show_every_row_and_how_ours_compares():
    record = results(
        row("official", (4, 4, 4)), row("stock", (2, 2, 2), images=8), row("gdd_fast"), row("graph", (3, 3, 3))
    )
    record.add([Row("residual forward", "c", "gdd_fast:triton", failure="wrong: a|b")])
    short, long = tables.readme([record]), tables.docs([record])
    assert "| generator, n | 4 s | 2 s | 3 s | 1 s | 2.00 x |" in short
    assert "residual" not in short and "wrong: a/b" in long and "#### residual forward" in long
    _, of_generator = long.split("#### generator")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in of_generator.split("\n") if "|" in line]
    assert lines[0] == ["case", "peer", "median", "20 % to 80 %", "times faster", "images/s"]  # none that is empty
    assert [line[4] for line in lines[2:6]] == ["0.50 x", "", "2.00 x", "0.67 x"]
    assert "No GPU has been measured" in short and "No GPU has been measured" in long


def test_a_waterfall_is_compared_with_its_first_row():
    steps = [Row("waterfall sampling", "n", peer, wall=[t, t, t]) for peer, t in (("public settings", 4), ("bf16", 2))]
    assert "| bf16 | 2 s | 2 s to 2 s | 2.00 x |" in tables.docs([results(*steps)])


def test_tables_without_a_record_speak_of_no_figure():
    for page in (tables.readme, tables.docs):
        assert "No figure has been recorded yet" in page([]) and "every figure" not in page([])


def test_tables_name_the_commit_of_kept_rows_and_never_compare_across_commits():
    kept = row("stock", (2, 2, 2), bytes=10**8, extra={"commit": "older"})
    record = results(kept, row(bytes=10**8))
    short, long = tables.readme([record]), tables.docs([record])
    assert "2 s (at commit older)" in short and " x |" not in short
    assert "stock (at commit older)" in long and "kept from an earlier run" in long and "same run" not in long
    assert " 10 %" in long and " 5 %" not in long  # of ours alone: the rates are not of the kept row's run
    assert "earlier run" not in tables.docs([results(row())])


def test_a_bound_is_compared_with_nothing_and_has_bytes_of_its_own():
    x = torch.rand(8)
    bench = Bench(
        {"copy of x": lambda: lambda: x + 1, "gdd_fast": lambda: x.clone},
        Closeness(x, 1e-6).check,
        bytes=64,
        flops=8,
        bounds={"copy of x": 32},
        precisions={"gdd_fast": "bf16"},
    )
    bound, ours = measure_case(Case("g", "c", lambda device: bench), CPU, QUICK)
    assert bound.failure is None and (bound.bytes, bound.flops) == (32, None)
    assert (ours.bytes, ours.flops, ours.precision) == (64, 8, "bf16")


def test_peers_that_compile_are_left_out_where_nothing_is_timed():
    def refuse():
        raise AssertionError("compiled")

    work = Case("g", "c", lambda device: Bench({"OneStepGenerator:compile": refuse}, lambda outputs: None))
    assert list(measure_case(work, CPU, Effort(0.0))) == []
    assert [r.failure for r in measure_case(work, CPU, QUICK)] == ["AssertionError: compiled"]


def test_peak_memory_on_a_cpu_is_what_a_call_holds_at_once(capfd):
    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert peak_bytes(call, CPU) == pytest.approx(2 << 20, rel=1e-3)
    assert peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""


def test_a_call_of_seconds_is_warm_after_one(monkeypatch):
    monkeypatch.setattr(timing, "_VERY_LONG", 0.0)
    calls = []
    Sampler(lambda: calls.append(None), CPU).warm_up(10.0, least=5)
    assert len(calls) == 1


@pytest.mark.parametrize("peer", ["graph", "gdd_fast graph", "OneStepGenerator:graph", "max-autotune"])
def test_peers_in_graphs_have_no_peak(peer, monkeypatch):
    monkeypatch.setattr(case, "peak_bytes", lambda call, device: 7)
    bench = Bench({peer: lambda: lambda: torch.ones(1), "stock": lambda: lambda: torch.ones(1)}, lambda outputs: None)
    found = {r.peer: r.peak_bytes for r in measure_case(Case("g", "c", lambda device: bench), CPU, QUICK)}
    assert found == {peer: None, "stock": 7}


def test_a_processor_that_imitates_an_older_one_has_a_record_of_its_own(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    own = machine.file_name(cpu)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.file_name(cpu) == own.replace(f"-{torch.get_num_threads()}-", f"-avx2-{torch.get_num_threads()}-")
    records = [
        Results({**MACHINE, "date": date, "onednn_max_cpu_isa": older}, RATES, [Row("generator", case, "stock", 4)])
        for date, older, case in (("2026-01-02", "AVX2", "imitated"), ("2026-01-01", None, "real"))
    ]
    assert "| generator, real |" in tables.readme(records) and "imitated" not in tables.readme(records)


def test_tables_replace_what_is_between_the_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    page, folder = tmp_path / "docs" / "benchmarks.md", tmp_path / "results"
    page.write_text(f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n")
    (tmp_path / "README.md").write_text("no markers, left alone\n")
    results(row()).save(folder / "d.json")
    ((path, text),) = tables.outdated(tmp_path, folder).items()
    assert path == page and "old" not in text and "#### generator" in text and text.endswith("\nb\n")
    page.write_text(text)
    assert tables.outdated(tmp_path, folder) == {}


def test_the_committed_pages_agree_with_the_committed_results():
    assert not tables.outdated(), "run `python -m benchmarks.reports.tables`"


def test_seconds_are_shown_with_a_unit():
    assert [format_seconds(s) for s in (None, 2.5, 0.0123, 4.5e-6)] == ["-", "2.5 s", "12.3 ms", "4.5 us"]


@pytest.mark.parametrize(
    ("device", "full", "is_full"), [("cuda", None, 1), ("cuda", False, 0), ("cpu", None, 0), ("cpu", True, 1)]
)
def test_everything_is_measured_on_a_gpu_and_a_sample_on_a_cpu(device, full, is_full):
    options = {"--full": full, "--bench-device": device}
    cases = conftest.cases_for("network_case", SimpleNamespace(getoption=options.get))
    assert any("adm-64" in case.name for case in cases) == is_full


def test_pytest_run_keeps_its_rows(tmp_path):
    """Through pytest itself: a case is checked, timed by pytest-benchmark, and written to the file asked for."""
    out = tmp_path / "rows.json"
    options = [
        "--benchmark-only",
        "-q",
        "-k",
        "distance",
        f"--record-to={out}",
        "--bench-device=cpu",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "benchmarks/test_pipelines.py", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no -n 2 in it
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = Results.load(out)
    assert {r.peer for r in kept.rows} == {"official", "gdd_fast"} and all(r.wall for r in kept.rows)
    assert kept.rates["copy"] > 0 and "Frechet distance" in done.stdout
