"""SIGINT and SIGTERM, held back for a block; what a run asks of them is in test_loop_stops.py."""

import os
import signal
import sys
import threading
import time

import pytest

from gdd_fast import signals
from gdd_fast.signals import SIGNALS, Interruptible, StopRequest

BOTH = pytest.mark.parametrize("number", SIGNALS)


def ends(number: int):
    """As the block does."""
    return pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else pytest.raises(SystemExit, match=r"^143$")


@BOTH
def test_a_block_ends_in_an_exception(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with ends(number), Interruptible():
        signal.raise_signal(number)
        pytest.fail("went on")
    assert [signal.getsignal(each) for each in SIGNALS] == before


@BOTH
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_handlers_are_put_back_whenever_it_comes(monkeypatch, number, call):
    """After any of the four calls that set a handler or put one back."""
    set_handler, calls = signal.signal, []

    def interrupted(*arguments):
        calls.append(arguments)
        set_handler(*arguments)
        if len(calls) == call:
            signal.raise_signal(number)

    monkeypatch.setattr(signal, "signal", interrupted)
    old = set_handler(signal.SIGTERM, lambda *_: sys.exit(1))  # the default one would end the tests
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)), Interruptible():
            pass
        assert [signal.getsignal(each) for each in SIGNALS] == before
    finally:
        set_handler(signal.SIGTERM, old)


@BOTH
def test_it_takes_effect_at_the_end_of_what_is_held(number):
    done = []
    with ends(number), Interruptible() as block:
        with block.held():
            with block.held():
                signal.raise_signal(number)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


@BOTH
def test_one_delivered_twice_is_one_and_a_later_one_is_not_held(monkeypatch, number):
    done = []
    with ends(number), Interruptible() as block, block.held():
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        done.append("twice")
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    with ends(number), Interruptible() as block, block.held():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)
        signal.raise_signal(number)
        done.append("later")
    assert done == ["twice"]


def test_what_is_held_while_the_block_ends_is_not_ended_by_the_same_signal():
    done = []
    with pytest.raises(KeyboardInterrupt), Interruptible() as block:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with block.held():
                signal.raise_signal(signal.SIGINT)
                done.append("tidied up")
    assert done == ["tidied up"]


def test_an_error_within_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as end, Interruptible() as block, block.held():
        signal.raise_signal(signal.SIGINT)
        raise OSError("disk full")
    assert isinstance(end.value.__context__, OSError)


@BOTH
def test_handlers_of_others(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append("mine"))
    try:
        with Interruptible() as block:
            with block.held():
                signal.raise_signal(number)
                assert not seen
            assert seen == ["mine"]
            signal.raise_signal(number)
        signal.signal(number, signal.SIG_IGN)
        with Interruptible() as block:
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert seen == ["mine", "mine"]


def test_other_threads():
    seen = []

    def elsewhere() -> None:
        with Interruptible() as block, block.held():  # signal.signal would raise here
            seen.append("elsewhere")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["elsewhere"]


@BOTH
def test_a_reader_of_stderr_that_died_of_the_same_signal(number):
    """As in `2>&1 | tee log`: the words are lost, and the work is put in order all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
        with ends(number), Interruptible():
            signal.raise_signal(number)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writing)
    assert stop.signal == number
