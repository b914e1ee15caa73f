"""The study on real data: what it trains, in which order, that it goes on where it stopped, and what it reports."""

import dataclasses
import json
import sys
import time

import pytest
import torch
from tiny_run import FLAGS

from benchmarks.study import __main__ as study_command
from benchmarks.study import plans, tables, training
from benchmarks.study.folders import Folders, write_json
from benchmarks.study.plans import CIFAR32, STUDIES, Run, Source, Study
from gdd_fast.config import override, preset
from gdd_fast.distill.pretraining import PretrainConfig
from gdd_fast.models.files.load import load_generator
from gdd_fast.signals import StopRequest

TINY = Study(
    name="tiny",
    title="a smoke test",
    train=Source(("demo",)),
    test=Source(("demo-test",)),
    teacher=None,
    preset="demo",
    base={k: v for k, v in FLAGS.items() if k not in ("duration_mimg", "class_embedding")} | {"evaluate_images": 0},
    runs=(Run("gdd-i", "GDD-I", milestones=(8, 16)), Run("gdd", "GDD", {"freeze": 0}, milestones=(8,))),
    features=("pixels",),
    images=16,
    seed_sets=1,
    teacher_steps=(2,),
)


@pytest.fixture
def tiny_study(monkeypatch):
    monkeypatch.setitem(STUDIES, "tiny", TINY)


@pytest.mark.parametrize("study", plans.STUDIES.values(), ids=lambda study: study.name)
def test_every_run_is_one_that_the_command_takes(study, tmp_path):
    folders = Folders(study, tmp_path, tmp_path)
    names = [run.name for run in study.all_runs()]
    assert len(set(names)) == len(names)
    for run in study.all_runs():
        flags = training.flags_of(folders, run, run.milestones[-1])
        override(preset(study.preset), **flags).validate()
        assert list(run.milestones) == sorted(run.milestones)
    if study.teacher is not None:
        PretrainConfig(**study.teacher).validate()


def test_runs_reach_a_milestone_together():
    a, b = Run("a", "", milestones=(1, 2)), Run("b", "", milestones=(2, 3), seeds=2)
    runs = (*a.seeded(), *b.seeded())
    assert [(run.name, m) for run, m in training.order(runs, ())] == [
        ("a", 1), ("a", 2), ("b", 2), ("b-s1", 2), ("b", 3), ("b-s1", 3),
    ]  # fmt: skip
    assert [run.name for run, _ in training.order(runs, ("b-s1",))] == ["b-s1", "b-s1"]


def test_settings_become_flags():
    flags = {"x_flip": False, "cond": True, "channel_mult": (1, 2), "g_lr": 1e-3}
    assert training.arguments(flags) == [
        "--no-x-flip", "--cond", "--channel-mult", "1", "2", "--g-lr", "0.001",
    ]  # fmt: skip


def test_the_teacher_is_judged_by_networks_that_no_discriminator_looks_through():
    assert "resnet56" in CIFAR32.features and "resnet56" not in CIFAR32.base["backbones"]


def test_a_command_is_told_to_stop_when_the_budget_is_spent(tmp_path):
    program = (
        "import signal, sys, time\n"
        "def end(*_):\n    print('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('begun', flush=True)\ntime.sleep(60)"
    )
    with StopRequest() as stop, pytest.raises(training.OutOfTime):
        budget = training.Budget(None, stop)
        budget.end = time.monotonic() + 3
        training.call([sys.executable, "-c", program], tmp_path / "log.txt", budget)
    assert "begun\nsaved\n" in (tmp_path / "log.txt").read_text()


def test_trained_judged_and_tabled_and_goes_on(tmp_path, tiny_study, capsys):
    arguments = ["tiny", "--root", str(tmp_path / "root"), "--only", "gdd-i"]
    study_command.main([*arguments, "--part", "train", "--budget-minutes", "0"])
    assert not (tmp_path / "root/snapshots").exists() and "goes on from here" in capsys.readouterr().out
    study_command.main([*arguments])
    snapshots = {m: load_generator(tmp_path / f"root/snapshots/gdd-i/{m:09d}") for m in (8, 16)}
    moved = [
        not torch.equal(a, b) for a, b in zip(*(list(net.parameters()) for net in snapshots.values()), strict=True)
    ]
    assert any(moved)  # the second is of a run that went on from the first
    assert "Resuming" in (tmp_path / "root/runs/gdd-i/log.txt").read_text()

    study_command.main(["tiny", "--root", str(tmp_path / "root"), "--table", str(tmp_path / "tables")])
    rows = json.loads((tmp_path / "tables/tiny.json").read_text())["rows"]
    assert [(row["what"], row["trained"], row["images"]) for row in rows] == [("gdd-i", 8, 16), ("gdd-i", 16, 16)]
    assert all(row["frechet"]["pixels-16"]["mean"] > 0 and row["minutes"] > 0 for row in rows)
    assert "After 16 images" in (tmp_path / "tables/tiny.md").read_text()
    for picture in ("curves", "sheet"):
        assert (tmp_path / f"tables/tiny-{picture}.png").stat().st_size > 1000
        assert f"(tiny-{picture}.png)" in (tmp_path / "tables/tiny.md").read_text()


def test_a_run_does_not_go_back_to_a_milestone_that_it_went_by(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "distill", lambda folders, run, milestone, budget: trained.append(milestone))
    for milestones in ((8, 16), (4, 16, 32)):
        study = dataclasses.replace(TINY, runs=(Run("a", "", milestones=milestones),))
        folders = Folders(study, tmp_path)
        with StopRequest() as stop:
            training.train(folders, (), training.Budget(None, stop))
        for milestone in trained:
            write_json(folders.snapshot(study.runs[0], milestone) / "config.json", {})
    assert trained == [8, 16, 32]


def test_a_run_that_fails_is_passed_over(tmp_path, monkeypatch):
    bad = dataclasses.replace(TINY, runs=(Run("bad", "", {"batch": 1}, milestones=(8, 16)),))
    folders = Folders(bad, tmp_path)
    calls = []
    monkeypatch.setattr(training, "call", lambda *_: calls.append(1) or 2)
    (tmp_path / "runs/bad").mkdir(parents=True)
    (tmp_path / "runs/bad/log.txt").write_text("error: --batch must be at least 2")
    with StopRequest() as stop:
        training.train(folders, (), training.Budget(None, stop))
    assert len(calls) == 1 and "--batch" in folders.failure(bad.runs[0]).read_text()
    assert tables.collect(folders)["failed"] == ["bad"]


def test_seed_sets_are_averaged_and_their_deviation_is_told(tmp_path):
    folders = Folders(TINY, tmp_path)
    for seed_set, distance in enumerate((10.0, 12.0, 14.0)):
        figures = {"frechet": {"pixels-16": distance}, "kernel": {"pixels-16": [0.001, 0.1]}}
        figures["precision_recall"] = {"pixels-16": [0.5, 0.25]}
        write_json(folders.judged("gdd-i", 8, "one-step", seed_set), {"images": 16, **figures})
    (tmp_path / "runs/gdd-i").mkdir(parents=True)
    # stopped once on the way, then a part that belongs to the next milestone
    parts = [{"images": 4, "cpu_s": 60}, {"images": 8, "cpu_s": 30}, {"images": 12, "cpu_s": 600}]
    (tmp_path / "runs/gdd-i/cost.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    (row,) = tables.collect(folders)["rows"]
    assert row["frechet"]["pixels-16"] == {"mean": 12.0, "deviation": 2.0}
    assert row["minutes"] == 1.5
    assert "12.0 ± 2" in tables.as_markdown(folders, {"rows": [row], "failed": [], "title": ""})
