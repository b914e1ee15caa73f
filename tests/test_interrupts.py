"""Ctrl-C, held back for a block."""

import signal
import threading

import pytest

from gdd_fast.inference.interrupts import interrupt_held


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_takes_effect_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_held():
        interrupt()
        done.append("inside")
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert done == ["inside"], "and afterwards everything is as it was"


def test_a_second_one_is_not_held():
    with pytest.raises(KeyboardInterrupt), interrupt_held():
        interrupt()
        interrupt()
        pytest.fail("was held twice")


def test_blocks_within_blocks():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_held():
        with interrupt_held():
            interrupt()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_an_error_within_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as end, interrupt_held():
        interrupt()
        raise OSError("disk full")
    assert isinstance(end.value.__context__, OSError)


def test_handlers_of_others_and_other_threads():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        with interrupt_held():
            interrupt()
            assert not seen
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGINT, before)

    def elsewhere() -> None:
        with interrupt_held():  # signal.signal would raise here
            seen.append("elsewhere")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["mine", "elsewhere"]
