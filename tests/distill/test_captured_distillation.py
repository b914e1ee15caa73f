"""An iteration that is recorded and replayed is the eager one, to the bit; and on a GPU nothing in it would wait."""

import copy
from unittest import mock

import pytest
import torch
from tiny_run import ALONE, BATCH, tiny_config

from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.layers.spectral_conv import SpectralConv2d
from gdd_fast.training import checkpoint
from gdd_fast.training.captured_steps import CapturedSteps
from gdd_fast.training.optimizer import AdamEma
from gdd_fast.training.trial import Trial
from rehearsal import Rehearsal

pytestmark = pytest.mark.usefixtures("plain", "norms_of_a_gpu")

LOGGED = {"loss_g", "loss_d", "r1_penalty", "grad_norm_g", "grad_norm_d", "grad_norm_r1"}
LOGGED |= {f"{name}_{kind}" for name in ("logit", "sign_accuracy") for kind in ("fake", "real")}
INTERVAL, SKIPPED, FASTER = 3, 9, 10
OPTIONS = [{}, {"reuse_fakes": True}]
"""Steps of the paper, and a G step that hands its images to the D step."""


@pytest.fixture(scope="module")
def built(inputs):
    return components.build(tiny_config(inputs, backend="torch"))


@pytest.fixture
def norms_of_a_gpu(monkeypatch):
    """Spectral norms as everywhere but on a CPU, where a convolution is another one when it is watched."""
    monkeypatch.setattr(SpectralConv2d, "divide_result", False)


def task_of(inputs, built, recorder, *, trial=False, **settings):
    settings = {"backend": "torch", "r1_interval": INTERVAL, "r1_gamma": 0.1, **settings}
    task = Distillation(tiny_config(inputs, **settings), copy.deepcopy(built), ALONE)
    task.steps = CapturedSteps(recorder, Trial(task.changing, task.random) if trial else None)
    return task


def iterate(task, start, stop):
    """Iteration `SKIPPED` has weights, for its time, whose gradients are not finite; `FASTER` has other rates."""
    for number in range(start, stop):
        weight = next(p for p in task.generator.parameters() if p.requires_grad)
        kept = weight.detach().clone()
        if number == SKIPPED:
            weight.detach().fill_(float("inf"))
        if number >= FASTER:
            for guard in (task.g_guard, task.d_guard):
                guard.optimizer.param_groups[0]["lr"] = 1e-3
        task.iteration(number * BATCH)
        if number == SKIPPED:
            weight.detach().copy_(kept)


def compare(expected, found, skipped={"g": 1, "d": 1, "r1": 0}):  # noqa: B006
    (sections, values), (others, other_values) = expected.state(), found.state()
    assert values["skipped"] == other_values["skipped"] == skipped
    for name, tensors in sections.items():
        assert tensors.keys() == others[name].keys()
        assert [key for key in tensors if not same(tensors[key], others[name][key])] == [], name


def same(a, b):
    """To the bit; running statistics of heads, which nothing reads, are NaN after the skipped step."""
    return a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_replayed_iterations_are_the_eager_ones_to_the_bit(inputs, built, options):
    """Weights, moments, averages, counts, random state and log, with R1, a skipped step and a new learning rate."""
    recorder, stop = Rehearsal(), 14
    eager, replayed = task_of(inputs, built, None, **options), task_of(inputs, built, recorder, **options)
    for task in (eager, replayed):
        iterate(task, 0, stop)
    assert recorder.replays == 2 * (stop - 3) + 1
    compare(eager, replayed)
    log, other = eager.averages.take(), replayed.averages.take()
    assert log.keys() == other.keys() == LOGGED
    assert all(log[key] == other[key] or log[key] != log[key] for key in log)  # NaN where a step was skipped


class Stale:
    """A recorder whose replays go on with the inputs that they were recorded with, as if nobody filled the buffers."""

    warm_up = 1

    def eagerly(self, step, inputs):
        return step(*inputs)

    def record(self, step, inputs):
        first = [None if t is None else t.clone() for t in inputs]
        return lambda: step(*first)


class Interrupted(Stale):
    """A recorder that fails where gradients are there and not yet applied."""

    def record(self, step, inputs):
        with mock.patch.object(AdamEma, "step", side_effect=RuntimeError("CUDA error: not while capturing")):
            return step(*inputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_recording_on_trial_is_used_if_right_and_leaves_no_trace_if_not(inputs, built, capsys, options):
    """What `--engine auto` does on a GPU. A step's state that the trial forgot would differ from the eager run's."""
    stop, recorder = 6, Rehearsal(warm_up=1)
    recorders = (None, recorder, Stale(), Interrupted())
    tasks = [task_of(inputs, built, r, trial=r is not None, **options) for r in recorders]
    for task in tasks[:2]:
        iterate(task, 0, stop)
    assert tasks[1].steps.recorder is recorder and recorder.replays == 2 * (stop - 2)
    assert capsys.readouterr().err == ""
    for task in tasks[2:]:
        iterate(task, 0, stop)
        assert task.steps.recorder is None
        assert "Steps run eagerly, as a captured one failed its check: " in capsys.readouterr().err
    for task in tasks[1:]:
        compare(tasks[0], task, {"g": 0, "d": 0, "r1": 0})


@pytest.mark.slow
def test_fifty_iterations_and_a_resumed_run(inputs, built, tmp_path):
    """Gradients accumulated over micro-batches too."""
    stop, saved = 50, 30
    eager, first, second = (task_of(inputs, built, r, batch_gpu=2) for r in (None, Rehearsal(), Rehearsal()))
    iterate(eager, 0, stop)
    iterate(first, 0, saved)
    sections, values = first.state()
    checkpoint.save(tmp_path / "state", sections, {**values, "images": saved * BATCH})
    second.restore(checkpoint.load(tmp_path / "state"))
    iterate(second, saved, stop)
    compare(eager, second)
