"""Half of the cores for each of two threads, and all of them again afterwards."""

import threading

import pytest
import torch

from gdd_fast.training.two_threads import TwoThreads


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_each_has_half_of_the_threads_from_the_first_work_to_the_end():
    two = TwoThreads()
    assert torch.get_num_threads() == 4
    seen = two.start(lambda: (torch.get_num_threads(), threading.get_ident()))
    assert seen.result() == (2, seen.result()[1]) and seen.result()[1] != threading.get_ident()
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), two.together():
        assert torch.get_num_threads() == 4
        raise KeyError
    assert torch.get_num_threads() == 2
    two.close()
    assert torch.get_num_threads() == 4
    assert not any(thread.name.startswith("second") for thread in threading.enumerate())


def test_work_begins_behind_what_was_given_before():
    two, done, may_go_on = TwoThreads(), [], threading.Event()
    two.start(lambda: (may_go_on.wait(10), done.append(1)))
    second = two.start(lambda: done.append(2))
    assert not done
    may_go_on.set()
    second.result()
    assert done == [1, 2]
    two.close()


def test_an_error_in_the_other_thread_is_raised_where_its_result_is_asked_for():
    def fail():
        raise RuntimeError("no memory")

    two = TwoThreads()
    failed = two.start(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        failed.result()
    assert two.start(lambda: 1).result() == 1
    two.close()


def test_closing_what_was_never_used_changes_nothing():
    two = TwoThreads()
    torch.set_num_threads(3)
    two.close()
    assert torch.get_num_threads() == 3
