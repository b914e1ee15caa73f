"""What a rehearsal of a capture finds, each made wrong once; when steps are recorded; recordings on trial."""

import math

import pytest
import torch
from torch import nn

from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.ranks import World
from gdd_fast.training.captured_steps import CapturedSteps, choose_step_engine
from gdd_fast.training.random_state import RandomState
from gdd_fast.training.trial import Trial
from rehearsal import CaptureError, Rehearsal, forbid_waiting

CPU = torch.device("cpu")


class Line:
    """Fits y = w x by gradient descent, in steps that can be captured."""

    def __init__(self):
        self.weight, self.rate = nn.Parameter(torch.ones(3)), torch.tensor(0.1)

    def __call__(self, x):
        loss = ((self.weight * x).sum() - 1).square()
        (gradient,) = torch.autograd.grad(loss, self.weight)
        with torch.no_grad():
            self.weight -= self.rate * gradient
        return {"loss": loss.detach()}


def run(step, recorder, calls=6):
    random, steps = torch.Generator().manual_seed(0), CapturedSteps(recorder)
    return [float(steps("step", step, torch.randn(3, generator=random))["loss"]) for _ in range(calls)]


def test_replays_are_the_step():
    recorder, eager, replayed = Rehearsal(), Line(), Line()
    assert run(eager, None) == run(replayed, recorder)
    assert torch.equal(eager.weight, replayed.weight) and recorder.replays == 3


def test_random_numbers_go_on_from_replay_to_replay():
    def step(generator):
        return lambda x: {"loss": (x + torch.randn(3, generator=generator)).sum()}

    assert run(step(torch.Generator().manual_seed(1)), None) == run(step(torch.Generator().manual_seed(1)), Rehearsal())


def test_other_shapes_are_recorded_for_themselves():
    recorder, line = Rehearsal(), Line()
    steps = CapturedSteps(recorder)
    for size in (3, 1, 3, 1, 3, 1):
        steps("step", line, torch.ones(size))
    assert recorder.replays == 0 and len(steps._recorded) == 2
    steps("step", line, torch.ones(1))
    assert recorder.replays == 1


def test_a_number_that_changes_is_found():
    line, count = Line(), iter(range(10))

    def step(x):
        return {"loss": line(x)["loss"] * (1 + next(count))}

    with pytest.raises(CaptureError, match=r"aten.mul.Tensor is given 2 in one call and 3 in the next"):
        run(step, Rehearsal())


def test_a_tensor_that_is_not_refilled_is_found():
    line, batch = Line(), {}

    def step(x):
        return line(batch["x"])

    steps = CapturedSteps(Rehearsal())
    with pytest.raises(CaptureError, match=r"reads torch.float32 \(3,\) that nobody holds any more"):
        for _ in range(6):
            batch["x"] = torch.randn(3)
            steps("step", step, batch["x"])


def test_memory_that_outlives_the_step_is_found():
    line, kept = Line(), []

    def step(x):
        kept[:] = [x * 2]
        return line(x)

    with pytest.raises(CaptureError, match=r"memory outlives the step: aten.mul.Tensor \(3,\)"):
        run(step, Rehearsal())


def test_what_is_left_from_the_last_replay_is_poisoned():
    """A result that is written only in part shows it."""
    line = Line()

    def step(x):
        scratch = torch.empty(3)
        scratch[:2] = x[:2]
        return {"loss": line(x)["loss"] + scratch.sum()}

    assert [value != value for value in run(step, Rehearsal())[3:]] == [True] * 3


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x[0] > 0)])
def test_waiting_is_found(wait):
    with pytest.raises(CaptureError, match="waits for the device"), forbid_waiting():
        wait(torch.ones(3))


def test_copies_between_devices_are_found():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with forbid_waiting():
            assert (x * 2).device.type == "cuda"
        with pytest.raises(CaptureError, match="copies between cpu and cuda"), forbid_waiting():
            x.cpu()


class Broken:
    """A recorder whose replays are those of `record`, a function of the step and its buffers."""

    warm_up = 1

    def __init__(self, record):
        self.record = record

    def eagerly(self, step, inputs):
        return step(*inputs)


def refuses(step, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")


def does_nothing(step, inputs):
    return lambda: {"loss": torch.ones(())}


def forgets_the_weight(step, inputs):
    kept = step.line.weight

    def replay():
        step.line.weight = nn.Parameter(kept.detach().clone())
        values = step(*inputs)
        step.line.weight = kept
        return values

    return replay


def has_stale_inputs(step, inputs):
    first = inputs[0].clone()
    return lambda: step(first)


def has_stale_numbers(step, inputs):
    state = step.random.generator.get_state()

    def replay():
        step.random.generator.set_state(state)
        return step(*inputs)

    return replay


def makes_nan(step, inputs):
    def replay():
        values = step(*inputs)
        step.line.weight.detach().fill_(math.nan)
        return values

    return replay


class Noisy:
    """A step with random numbers of its own; `state` is what it changes."""

    def __init__(self):
        self.line, self.random = Line(), RandomState(0, World(0, 1, CPU))

    def __call__(self, x):
        return self.line(x + torch.randn(3, generator=self.random.generator))

    def state(self):
        return [self.line.weight]


def on_trial(recorder, calls=6):
    step, inputs = Noisy(), torch.Generator().manual_seed(0)
    steps = CapturedSteps(recorder, Trial(step.state, step.random))
    losses = [float(steps("step", step, torch.randn(3, generator=inputs))["loss"]) for _ in range(calls)]
    return losses, step.line.weight, step.random.generator.get_state(), steps.recorder


def test_a_replay_that_does_what_the_step_does_passes_its_trial(capsys):
    recorder = Rehearsal()
    *found, used = on_trial(recorder)
    *expected, _ = on_trial(None)
    assert used is recorder and recorder.replays == 3 and capsys.readouterr().err == ""
    assert found[0] == expected[0] and all(map(torch.equal, found[1:], expected[1:]))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refuses, "RuntimeError: operation not permitted when stream is capturing\n"),
        (does_nothing, "loss is 1, but "),
        (forgets_the_weight, "what it changes is off by "),
        (has_stale_inputs, "loss is "),
        (has_stale_numbers, "loss is "),
        (makes_nan, "it makes values infinite or NaN"),
    ],
)
def test_a_replay_that_does_not_is_left_and_the_run_is_the_eager_one(record, reason, capsys):
    *found, used = on_trial(Broken(record))
    *expected, _ = on_trial(None)
    assert used is None
    assert f"Steps run eagerly, as a captured one failed its check: {reason}" in capsys.readouterr().err
    assert found[0] == expected[0] and all(map(torch.equal, found[1:], expected[1:]))


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_by_name(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gpu = torch.device("cuda")
    assert choose_step_engine("auto", CPU, 1) == ("threads" if threads > 1 else "eager")
    assert choose_step_engine("threads", CPU, 1) == "threads"
    alone = choose_step_engine("auto", CPU, 2), choose_step_engine("auto", CPU, 1, apart=False)
    assert {*alone, choose_step_engine("eager", CPU, 1)} == {"eager"}
    assert {choose_step_engine(engine, gpu, n) for engine in ("graph", "auto") for n in (1, 2)} == {"graph"}
    assert choose_step_engine("auto", gpu, 1, fixed=False) == "eager"
    assert choose_step_engine("compile", CPU, 1) == choose_step_engine("compile", gpu, 2, fixed=False) == "compile"
    with pytest.raises(BackendError, match="needs CUDA"):
        choose_step_engine("graph", CPU, 1)
    with pytest.raises(BackendError, match="for CPUs"):
        choose_step_engine("threads", gpu, 1)
    for options in ({"processes": 2}, {"processes": 1, "apart": False}):
        with pytest.raises(ConfigError, match="it needs --reuse-fakes, one process"):
            choose_step_engine("threads", CPU, **options)
    with pytest.raises(ConfigError, match="one of auto, eager, graph, compile, threads"):
        choose_step_engine("fast", CPU, 1)
