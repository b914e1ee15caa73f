"""Half of the cores for each of two threads, and all of them again afterwards."""

import threading
from functools import partial

import pytest
import torch

from gdd_fast.training.two_threads import TwoThreads, at_once

CPU = torch.device("cpu")


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


def test_all_cores_are_given_when_the_other_has_done_its_work():
    two, done = TwoThreads(), []
    two.start(lambda: (threading.Event().wait(0.2), done.append(1)))
    with two.together():
        assert done == [1]
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


def test_at_once_gives_both_results_in_their_order_and_an_error_of_either():
    met = threading.Barrier(2, timeout=10)

    def meet(name):
        met.wait()
        return name

    assert at_once(partial(meet, "a"), partial(meet, "b"), CPU) == ("a", "b")
    for failing in (0, 1):
        work = [lambda: 1, lambda: 1]
        work[failing] = lambda: 1 // 0
        with pytest.raises(ZeroDivisionError):
            at_once(*work, CPU)
        assert torch.get_num_threads() == 4


def test_at_once_is_one_after_the_other_where_there_is_one_thread_or_a_gpu():
    done = []
    for threads, device in ((1, CPU), (4, torch.device("cuda"))):
        torch.set_num_threads(threads)
        at_once(lambda: done.append(threading.get_ident()), lambda: done.append(threading.get_ident()), device)
    assert set(done) == {threading.get_ident()} and len(done) == 4
