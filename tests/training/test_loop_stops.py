"""How the loop ends before its time: signals, a limit of time, divergence, errors, a folder that is gone."""

import json
import os
import signal
import threading
import time

import pytest
from counting_task import CONFIG, Counting, lines
from tiny_run import ALONE

from gdd_fast import signals
from gdd_fast.errors import ConfigError, DivergedError
from gdd_fast.training import checkpoint, loggers
from gdd_fast.training.loop import CHECKPOINT, DIVERGED, Outcome, Schedule, run


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Its import takes seconds; one test asks for it."""
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)


def test_a_limit_of_time_saves_after_the_iteration(tmp_path):
    def stops_at(seconds):
        outcome = run(Counting(), tmp_path, CONFIG, Schedule(30, 100, 100, seconds=seconds), ALONE)
        return outcome.images, outcome.exit_status

    assert [stops_at(1e-9), stops_at(1e-9), stops_at(1e-9), stops_at(1e-9)] == [(10, 75), (20, 75), (30, 0), (30, 0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_iteration(tmp_path, number, capfd):
    before = signal.getsignal(number)
    task = Counting(at={50: lambda: os.kill(os.getpid(), number)})
    assert run(task, tmp_path, CONFIG, Schedule(100, 1000, 1000), ALONE) == Outcome(60, 60, number)
    assert signal.getsignal(number) is before and task.closed == 1
    assert "Stopping after this iteration" in capfd.readouterr().err
    resumed = Counting()
    assert run(resumed, tmp_path, CONFIG, Schedule(100, 1000, 1000), ALONE) == Outcome(100, 40)
    assert resumed.sum == 450


@pytest.mark.parametrize("behind", [True, False])
def test_a_signal_while_the_last_state_is_saved_counts_too(tmp_path, monkeypatch, behind):
    write = checkpoint.save

    def interrupted(path, sections, values):
        if values["images"] == 100:
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, sections, values)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    schedule = Schedule(100, 50, 50, behind=behind)
    assert run(Counting(), tmp_path, CONFIG, schedule, ALONE) == Outcome(100, 100, signal.SIGTERM)
    assert run(Counting(), tmp_path, CONFIG, schedule, ALONE) == Outcome(100, 0)


def test_a_second_ctrl_c_interrupts_and_one_delivered_twice_does_not(tmp_path, monkeypatch):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    task = Counting(at={0: lambda: (interrupt(), interrupt())})
    assert run(task, tmp_path / "a", CONFIG, Schedule(100, 50, 50), ALONE).signal == signal.SIGINT
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(Counting(at=task.at), tmp_path / "b", CONFIG, Schedule(100, 50, 50), ALONE)
    assert not (tmp_path / "b" / CHECKPOINT).exists()


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(Counting(), tmp_path, CONFIG, Schedule(20, 9, 9), ALONE)))
    thread.start()
    thread.join()
    assert found == [Outcome(20, 20)]


def diverge():
    raise DivergedError("too many")


def test_a_run_that_diverges_goes_on_from_the_checkpoint_before(tmp_path):
    schedule, config = Schedule(100, 10, 50), {**CONFIG, "g_lr": 1.0}
    task = Counting(at={70: diverge})
    with pytest.raises(DivergedError, match=r"too many\. .*diverged.* with a lower --x .* checkpoint of 50 images"):
        run(task, tmp_path, config, schedule, ALONE)
    assert task.closed == 1 and task.exports == 1
    assert checkpoint.load_values(tmp_path / DIVERGED)["images"] == 70
    assert checkpoint.load_values(tmp_path / CHECKPOINT)["images"] == 50
    again = Counting()
    assert run(again, tmp_path, {**config, "g_lr": 0.5}, schedule, ALONE) == Outcome(100, 50)
    assert again.sum == 450
    assert [line["images"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50, 50, 60, 70, 80, 90, 100]
    assert lines(tmp_path)[5] == {"images": 50, "changed": ["g_lr: 1.0 -> 0.5"]}
    assert json.loads((tmp_path / "config.json").read_text())["g_lr"] == 0.5


def test_a_run_that_diverges_before_its_first_checkpoint_begins_again(tmp_path):
    with pytest.raises(DivergedError, match="starts again"):
        run(Counting(at={20: diverge}), tmp_path, CONFIG, Schedule(100, 10, 50), ALONE)
    assert not (tmp_path / CHECKPOINT).exists()
    assert run(Counting(), tmp_path, CONFIG, Schedule(100, 10, 50), ALONE) == Outcome(100, 100)


def test_an_error_closes_the_task(tmp_path):
    task = Counting(at={20: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        run(task, tmp_path, CONFIG, Schedule(100, 50, 50), ALONE)
    assert task.closed == 1


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_a_folder_that_vanishes_ends_the_run_with_its_name(tmp_path, again):
    def vanish():
        (tmp_path / "r").rename(tmp_path / "elsewhere")
        if again:
            (tmp_path / "r").mkdir()

    task = Counting(at={50: vanish})
    with pytest.raises(ConfigError, match=f"{tmp_path / 'r'} was moved or deleted"):
        run(task, tmp_path / "r", CONFIG, Schedule(100, 10, 20, behind=False), ALONE)
    assert task.closed == 1 and not list(tmp_path.glob("r/*"))  # nothing that would look like a run
    assert checkpoint.load_values(tmp_path / "elsewhere" / CHECKPOINT)["images"] == 40
