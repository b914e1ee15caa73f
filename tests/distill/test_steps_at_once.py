"""G steps beside D steps (`--engine threads`), each drawn ahead, train as one after the other does."""

import copy
import threading

import pytest
import torch
from tiny_run import ALONE, BATCH, CLASSES, schedule_of, tiny_config, write_inputs

from gdd_fast.config import override, to_dict
from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.distill.run import preflight
from gdd_fast.distill.steps_at_once import StepsAtOnce
from gdd_fast.errors import ConfigError, DivergedError
from gdd_fast.training import checkpoint, loop

pytestmark = pytest.mark.usefixtures("plain")

SKIPPED = 5


@pytest.fixture(scope="module", params=["unconditional", "labels"])
def given(request, inputs, tmp_path_factory):
    if request.param == "unconditional":
        return inputs, {}
    folder = tmp_path_factory.mktemp("labelled")
    write_inputs(folder, CLASSES)
    return folder, {"cond": True}


@pytest.fixture
def make(given, tmp_path):
    folder, options = given
    built = components.build(tiny_config(folder, **options))

    def make(**settings):
        settings = {"run_dir": tmp_path / "run", "reuse_fakes": True, "r1_interval": 3, **options, **settings}
        return Task(tiny_config(folder, **settings), copy.deepcopy(built), ALONE)

    return make


class Task(Distillation):
    """Draws latents for iteration `SKIPPED` of which no finite image comes."""

    drawn = 0

    def _draw(self):
        z = super()._draw()
        self.drawn += 1
        return z.fill_(float("inf")) if self.drawn == SKIPPED + 1 else z


def iterate(task, start, stop):
    for number in range(start, stop):
        task.iteration(number * BATCH)


def assert_same(one, other):
    (sections, values), (others, other_values) = one.state(), other.state()
    assert values == other_values
    for name, tensors in sections.items():
        wrong = [k for k, t in tensors.items() if not torch.equal(t.nan_to_num(7), others[name][k].nan_to_num(7))]
        assert not wrong, (name, wrong)


def test_to_the_bit_with_r1_and_a_skipped_step_and_resumed(make, tmp_path):
    """PyTorch's own sums depend on how many threads share an operator: all tasks have one."""
    eager, whole, first, second = (make(engine=name) for name in ("eager", "threads", "threads", "threads"))
    iterate(eager, 0, 9)
    iterate(whole, 0, 9)
    for name in ("g", "d"):
        assert eager._guards()[name].skipped == whole._guards()[name].skipped == 1
    assert_same(eager, whole)
    log, other = eager.averages.take(), whole.averages.take()
    assert log.keys() == other.keys() and log.keys() >= {"loss_g", "loss_d", "r1_penalty", "grad_norm_d"}
    assert all(log[name] == other[name] or log[name] != log[name] for name in log)  # NaN where a step was skipped
    iterate(first, 0, 4)
    sections, values = first.state()
    checkpoint.save(tmp_path / "state", sections, {**values, "images": 4 * BATCH})
    iterate(second, 0, 1)  # what it has drawn ahead is of no use after
    second.restore(checkpoint.load(tmp_path / "state"))
    second.drawn = 4
    iterate(second, 4, 9)
    assert_same(eager, second)
    for task in (eager, whole, first, second):
        task.close()


def test_the_two_parts_are_in_two_threads_at_the_same_time(make):
    """The generator's first weight gets its gradient while the heads get theirs: each waits for the other."""
    task, meeting, seen = make(engine="threads"), threading.Barrier(2, timeout=30), {}

    def meet(name):
        def hook(gradient):
            seen[name] = threading.get_ident()
            meeting.wait()

        return hook

    next(p for p in task.generator.parameters() if p.requires_grad).register_hook(meet("generator"))
    task.adversary.train_heads(True)
    task.adversary.weights[-1].register_hook(meet("heads"))
    task.iteration(0)
    assert seen["heads"] == threading.get_ident() != seen["generator"]
    task.close()


def test_the_next_images_are_made_beside_the_end_of_a_d_step(make):
    """A forward of the generator and a backward of the heads wait for each other."""
    task, meeting, met = make(engine="threads"), threading.Barrier(2, timeout=30), []

    def meet(*_):
        if task.drawn == 2:
            met.append(threading.get_ident())
            meeting.wait()

    task.generator.register_forward_hook(meet)
    task.adversary.train_heads(True)
    task.adversary.weights[0].register_hook(meet)
    task.iteration(0)
    assert len(set(met)) == 2
    task.close()


def test_auto_is_that_where_it_can_be(make, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert isinstance(make().at_once, StepsAtOnce)
    for settings in ({"reuse_fakes": False}, {"batch_gpu": 2}, {"debug_finite": True}, {"engine": "eager"}):
        assert make(**settings).at_once is None
    with pytest.raises(ConfigError, match="it needs --reuse-fakes"):
        preflight(override(make().config, engine="threads", batch_gpu=2))


def test_a_run_ends_its_thread_and_gives_back_the_cores_however_it_ends(make):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        task = make()
        loop.run(task, task.config.run_dir, to_dict(task.config), schedule_of(task.config), ALONE)
        assert task.at_once is not None and torch.get_num_threads() == 2
        broken = make(run_dir=task.config.run_dir / "broken", max_skipped_steps=1, duration_mimg=1e-3)
        next(p for p in broken.generator.parameters() if p.requires_grad).detach().fill_(float("nan"))
        with pytest.raises(DivergedError, match="generator steps in a row"):
            config = broken.config
            loop.run(broken, config.run_dir, to_dict(config), schedule_of(config), ALONE)
        assert torch.get_num_threads() == 2
        assert not any(thread.name.startswith("second") for thread in threading.enumerate())
    finally:
        torch.set_num_threads(before)
