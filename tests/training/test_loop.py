"""The loop itself, over a task that only counts: ticks, checkpoints, metrics, resuming."""

import errno
import json
import os
import threading

import pytest
import torch
from counting_task import CONFIG, Counting, lines
from tiny_run import ALONE

from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.training import checkpoint, loggers
from gdd_fast.training.loop import CHECKPOINT, Outcome, Schedule, run
from gdd_fast.training.output import Averages


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Its import takes seconds; one test asks for it."""
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)


def test_a_run_from_start_to_end(tmp_path):
    task = Counting()
    assert run(task, tmp_path / "r", CONFIG, Schedule(100, 30, 60), ALONE) == Outcome(100, 100)
    assert task.ticks == [30, 60, 90, 100] and task.exports == 2 and task.closed == 1
    found = lines(tmp_path / "r")
    assert [line["images"] for line in found] == [30, 60, 90, 100]
    assert [line["loss_x"] for line in found] == [10, 40, 70, 90]  # means since the last tick
    assert all(line["images_per_second"] > 0 and line["extra"] == 1 for line in found)
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == CONFIG


def test_checkpoints_are_not_missed_when_a_batch_spans_ticks(tmp_path):
    task = Counting()
    run(task, tmp_path, CONFIG, Schedule(100, 4, 20), ALONE)
    assert task.exports == 5 and len(task.ticks) == 10


def test_a_finished_run_is_left_alone(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(100, 50, 50), ALONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Counting()
    assert run(again, tmp_path, {**CONFIG, "workers": 3}, Schedule(100, 50, 50), ALONE) == Outcome(100, 0)
    assert again.sum == 450 and again.closed == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert run(Counting(), tmp_path, CONFIG, Schedule(120, 50, 50), ALONE) == Outcome(120, 20)


def test_a_folder_whose_checkpoint_could_not_be_read_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ConfigError, match="this name is not UTF-8"):
        run(Counting(), tmp_path / os.fsdecode(b"r-\xff"), CONFIG, Schedule(100, 50, 50), ALONE)
    assert not os.listdir(tmp_path)


def test_a_checkpoint_is_of_its_moment_while_training_goes_on(tmp_path, monkeypatch):
    """The writer of the checkpoint of 50 images waits until all iterations are done."""
    finished, kept, write = threading.Event(), [], checkpoint.save

    def late(path, sections, values):
        waited = finished.wait(60)
        write(path, sections, values)
        kept.append((values["images"], float(checkpoint.load(path).section("x")["sum"]), waited))

    monkeypatch.setattr(checkpoint, "save", late)
    task = Counting(at={90: finished.set})
    run(task, tmp_path, CONFIG, Schedule(100, 50, 50), ALONE)
    assert kept == [(50, 100.0, True), (100, 450.0, True)]
    assert task.exports == 2 and (tmp_path / "sum.txt").read_text() == "450.0"


def test_training_can_wait_for_its_checkpoints(tmp_path, monkeypatch):
    written, write = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (write(*given), written.append(given[2]["images"])))
    task = Counting(at={50: lambda: written.append("goes on")})
    run(task, tmp_path, CONFIG, Schedule(100, 50, 50, behind=False), ALONE)
    assert written == [50, "goes on", 100]


def test_a_checkpoint_that_could_not_be_written_is_said_at_the_next(tmp_path, monkeypatch, capsys):
    write, full = checkpoint.save, {50, 100}

    def save(path, sections, values):
        if values["images"] in full:
            raise CheckpointError("the disk is full")
        write(path, sections, values)

    monkeypatch.setattr(checkpoint, "save", save)
    for last in (100, 50):  # the last one is waited for
        task = Counting()
        with pytest.raises(CheckpointError, match="full"):
            run(task, tmp_path, CONFIG, Schedule(last, 50, 50), ALONE)
        assert task.ticks[-1] == last and task.closed == 1 and not task.exports
        assert not (tmp_path / CHECKPOINT).exists()
    with pytest.raises(ZeroDivisionError):
        run(Counting(at={60: lambda: 1 / 0}), tmp_path, CONFIG, Schedule(100, 50, 50), ALONE)
    shown = capsys.readouterr()
    assert "The checkpoint of 50 images was not written: the disk is full" in shown.out + shown.err
    full.clear()
    assert run(Counting(), tmp_path, CONFIG, Schedule(100, 50, 50), ALONE) == Outcome(100, 100)


@pytest.mark.parametrize("checkpoint_before", [0, 50])
def test_an_export_that_is_not_of_the_checkpoint_is_made_again(tmp_path, checkpoint_before):
    """The process is killed between the last checkpoint and its export; then somebody deletes the export."""
    if checkpoint_before:
        run(Counting(), tmp_path, CONFIG, Schedule(checkpoint_before, 50, 50), ALONE)
    killed = Counting()
    killed.export = lambda *_: (_ for _ in ()).throw(SystemExit(137))
    with pytest.raises(SystemExit):
        run(killed, tmp_path, CONFIG, Schedule(100, 50, 1000), ALONE)
    assert checkpoint.load_values(tmp_path / CHECKPOINT)["images"] == 100
    for _ in range(2):
        assert run(Counting(), tmp_path, CONFIG, Schedule(100, 50, 50), ALONE) == Outcome(100, 0)
        assert (tmp_path / "sum.txt").read_text() == "450.0"
        (tmp_path / "sum.txt").unlink()


def test_another_batch_size_counts_images_on_and_is_recorded(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(30, 10, 10), ALONE)
    larger = Counting()
    larger.batch = 20
    assert run(larger, tmp_path, {**CONFIG, "batch": 20}, Schedule(100, 10, 10), ALONE) == Outcome(110, 80)
    assert larger.sum == 0 + 10 + 20 + 30 + 50 + 70 + 90
    assert lines(tmp_path)[3] == {"images": 30, "changed": ["batch: 10 -> 20"]}
    assert [line["images"] for line in lines(tmp_path)[4:]] == [50, 70, 90, 110]


def test_another_number_of_processes_is_recorded(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(30, 10, 10), ALONE)
    path = tmp_path / CHECKPOINT
    saved = checkpoint.load(path)
    checkpoint.save(path, {"x": saved.section("x")}, {**saved.values, "processes": 4})
    run(Counting(), tmp_path, CONFIG, Schedule(50, 10, 10), ALONE)
    assert lines(tmp_path)[3] == {"images": 30, "changed": ["processes: 4 -> 1"]}
    assert checkpoint.load_values(path)["processes"] == 1


def test_the_last_checkpoints_are_kept(tmp_path):
    schedule = Schedule(60, 10, 10, keep=3)
    run(Counting(), tmp_path, CONFIG, schedule, ALONE)
    names = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint-000000040.safetensors", "checkpoint-000000050.safetensors", CHECKPOINT]
    (tmp_path / names[0]).replace(tmp_path / CHECKPOINT)  # to go back to it
    again = Counting()
    assert run(again, tmp_path, CONFIG, schedule, ALONE) == Outcome(60, 20)
    assert again.sum == 150 and sorted(path.name for path in tmp_path.glob("checkpoint*")) == names
    assert [line["images"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("links", [True, False])
def test_kept_checkpoints_are_of_the_work_that_goes_on(tmp_path, monkeypatch, links):
    """Also where the work that was given up has left one of the same number, and on a disk without hard links."""

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    schedule = Schedule(50, 10, 10, keep=4)
    run(Counting(), tmp_path, CONFIG, schedule, ALONE)
    (tmp_path / "checkpoint-000000020.safetensors").replace(tmp_path / CHECKPOINT)
    other = Counting()
    other.at = {20: lambda: other.sum.add_(1000)}
    run(other, tmp_path, CONFIG, schedule, ALONE)
    kept = [tmp_path / f"checkpoint-0000000{n}.safetensors" for n in (20, 30, 40)]
    assert sorted(tmp_path.glob("*checkpoint*")) == [*kept, tmp_path / CHECKPOINT]
    assert [float(checkpoint.load(path).section("x")["sum"]) for path in kept] == [10, 1030, 1060]


def test_other_settings_do_not_resume_and_touch_nothing(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(20, 10, 10), ALONE)
    with pytest.raises(CheckpointError, match=r"seed: 0 -> 20.*choose another --run-dir"):
        run(Counting(), tmp_path, {**CONFIG, "seed": 20}, Schedule(40, 10, 10), ALONE)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_learning_rates_of_a_finished_run_do_not_change(tmp_path):
    config = {**CONFIG, "g_lr": 1.0}
    run(Counting(), tmp_path, config, Schedule(20, 10, 10), ALONE)
    with pytest.raises(CheckpointError, match=r"a finished run with other settings \(g_lr: 1.0 -> 0.5\)"):
        run(Counting(), tmp_path, {**config, "g_lr": 0.5}, Schedule(20, 10, 10), ALONE)


def test_other_contents_do_not_resume(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(20, 10, 10), ALONE)
    for total in (20, 40):
        with pytest.raises(CheckpointError, match=r"another --data: its path may change, its content may not; choose"):
            run(Counting(contents={"data": "b"}), tmp_path, CONFIG, Schedule(total, 10, 10), ALONE)


def test_a_run_of_yesterday_goes_on_although_a_setting_was_added(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(20, 10, 10), ALONE)
    today, defaults = {**CONFIG, "added": 1.0}, {"added": 1.0}
    assert run(Counting(), tmp_path, today, Schedule(40, 10, 10), ALONE, defaults) == Outcome(40, 20)
    with pytest.raises(CheckpointError, match=r"added: 1.0 -> 2.0"):
        run(Counting(), tmp_path, {**CONFIG, "added": 2.0}, Schedule(60, 10, 10), ALONE, defaults)


def test_metrics_of_lost_work_are_dropped(tmp_path):
    run(Counting(), tmp_path, CONFIG, Schedule(40, 10, 10), ALONE)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as after a crash: beyond the checkpoint, and cut short
        file.write('{"images": 50, "loss_x": 1}\n{"images": 6')
    run(Counting(), tmp_path, CONFIG, Schedule(70, 10, 10), ALONE)
    assert [line["images"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]
    assert "extra" in lines(tmp_path)[4]


def test_what_is_no_line_of_metrics_is_dropped(tmp_path):
    """As a disk leaves a file that was open when the machine went down, or an editor."""
    run(Counting(), tmp_path, CONFIG, Schedule(20, 10, 10), ALONE)
    damaged = b'\xff\xfe\x00\n[10]\n{"images": 15, "minutes": "x"}\n' + b"[" * 100_000 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(damaged + (tmp_path / "metrics.jsonl").read_bytes())
    run(Counting(), tmp_path, CONFIG, Schedule(30, 10, 10), ALONE)
    assert [line["images"] for line in lines(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize("harm", [{"images": None}, {"config": 3}, {"contents": []}])
def test_a_checkpoint_of_no_run_is_refused(tmp_path, harm):
    run(Counting(), tmp_path, CONFIG, Schedule(10, 10, 10), ALONE)
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    checkpoint.save(tmp_path / CHECKPOINT, saved.sections(), {**saved.values, **harm})
    with pytest.raises(CheckpointError, match="does not say which run it belongs to; move it away"):
        run(Counting(), tmp_path, CONFIG, Schedule(20, 10, 10), ALONE)


def test_a_value_that_is_not_finite_is_null(tmp_path):
    class Bad(Counting):
        def tick(self, images):
            return {"loss_nan": float("nan"), "loss_inf": float("inf")}

    run(Bad(), tmp_path, CONFIG, Schedule(10, 10, 10), ALONE)
    assert (lines(tmp_path)[0]["loss_nan"], lines(tmp_path)[0]["loss_inf"]) == (None, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    half = tmp_path / f".{CHECKPOINT}.01234567"
    half.mkdir()
    (half / CHECKPOINT).write_bytes(b"half")
    run(Counting(), tmp_path, CONFIG, Schedule(10, 10, 10), ALONE)
    assert not list(tmp_path.glob(".*"))
    for name in (f".{CHECKPOINT}.89abcdef", "generator_ema/.config.json.89abcdef"):  # behind its last rename
        (tmp_path / name).mkdir(parents=True)
    run(Counting(), tmp_path, CONFIG, Schedule(10, 10, 10), ALONE)
    assert not list(tmp_path.rglob(".*"))


def test_a_broken_tensorboard_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    run(Counting(), tmp_path, CONFIG, Schedule(10, 10, 10), ALONE)
    assert len(lines(tmp_path)) == 1
    shown = capsys.readouterr()
    assert "TensorBoard is installed but does not import" in shown.out + shown.err


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    run(Counting(), tmp_path, CONFIG, Schedule(40, 20, 20), ALONE)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_x")] == [(20, 5.0), (40, 25.0)]
    assert "images_per_second" in events.Tags()["scalars"]


def test_averages_do_not_mix_ticks():
    averages = Averages()
    averages.add("a", torch.tensor(1.0))
    averages.add("a", torch.tensor(2.0))
    averages.add("b", torch.tensor(5.0, requires_grad=True))
    assert averages.take() == {"a": 1.5, "b": 5.0}
    averages.add("a", torch.tensor(7.0))
    assert averages.take() == {"a": 7.0}
