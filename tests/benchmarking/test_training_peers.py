"""Training steps of the benchmarks: their peers are right, and one that is wrong by a percent gets no time."""

import itertools
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks.cases.training_cases import compiled_cases as compiled_training
from benchmarks.cases.training_cases import settings_bench, settings_for, training_cases
from benchmarks.cases.waterfall_cases import training_steps
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.training_checks import FLOAT32, Reference, Types, in_types, step_parts
from benchmarks.peers import networks as peers
from benchmarks.peers.training import OUR_SETTINGS, STOCK_SETTINGS, Batch, Settings, Setup, Training
from gdd_fast.layers import convolution, frozen_conv, self_attention
from gdd_fast.models.backbone_input import BackboneInput
from gdd_fast.ops import group_norm_silu, residual

CPU = torch.device("cpu")


def test_settings_of_the_waterfall_add_one_technique_each():
    steps = list(training_steps(CPU).values())
    changed = [[k for k in asdict(a) if asdict(a)[k] != asdict(b)[k]] for a, b in itertools.pairwise(steps)]
    assert all(changed) and steps[0].optimizer == "loop" and not steps[0].channels_last
    ours = next(s for s in steps if s.optimizer == "adam_ema")
    assert (ours.unet, ours.features) == (OUR_SETTINGS.unet, OUR_SETTINGS.features)


def test_a_training_step_applies_its_gradients_once():
    training = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU)
    batch = Batch.draw(training)
    weights = [p for p in training.generator.parameters() if p.requires_grad]
    before = [w.detach().clone() for w in weights]
    gradients = training.step("G", batch)
    assert any(g.abs().max() > 0 for g in gradients)
    moved = max(float((w.detach() - b).abs().max()) for w, b in zip(weights, before, strict=True))
    assert 0 < moved <= 1.01 * training.setup.config.generator.g_lr


@pytest.fixture(scope="module")
def generator_step():
    return Reference("G step", Setup("demo", 4), CPU)


BF16 = Types(torch.bfloat16, torch.bfloat16)


def test_the_halves_of_a_generator_step_make_the_whole():
    training = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU)
    batch = Batch.draw(training)
    put_back = training.undo()
    upstream = training.image_gradient(training.images(batch), None)
    halves = training.weight_gradients(batch, upstream)
    put_back()
    for half, whole in zip(halves, training.gradients("G", batch), strict=True):
        assert_close(half, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()) + 1e-9)


@pytest.mark.parametrize("types", [BF16, FLOAT32], ids=str)
def test_our_step_is_right(generator_step, types):
    generator_step.check_in(types, OUR_SETTINGS)


def multiplied(monkeypatch, place, operator, factor):
    """`operator` of the module `place` returns `factor` times what it should."""
    right = getattr(place, operator)

    def wrong(*args, **options):
        found = right(*args, **options)
        return [t * factor for t in found] if isinstance(found, list) else found * factor

    monkeypatch.setattr(place, operator, wrong)


OPERATORS = [
    (convolution, "resample2d"),
    (self_attention, "attention"),
    (convolution, "frozen_conv2d"),
    (group_norm_silu, "group_norm_silu"),
    (residual, "residual"),
    (frozen_conv, "frozen_conv2d_relu"),
    (BackboneInput, "forward"),
]


@pytest.mark.parametrize(("place", "operator"), OPERATORS, ids=lambda p: p if isinstance(p, str) else "")
def test_an_operator_wrong_by_a_percent_gives_a_training_step_no_time(generator_step, place, operator, monkeypatch):
    multiplied(monkeypatch, place, operator, 1.01)
    with pytest.raises(MismatchError, match="differs by"):
        generator_step.check_in(FLOAT32, OUR_SETTINGS)


def test_in_bf16_an_operator_has_to_be_more_wrong_than_its_rounding(generator_step, monkeypatch):
    multiplied(monkeypatch, convolution, "resample2d", 1.2)
    with pytest.raises(MismatchError, match="differs by"):
        generator_step.check_in(BF16, OUR_SETTINGS)


def test_the_first_gradients_of_a_timed_step_are_compared():
    reference = Reference("iteration", Setup("demo", 4), CPU)
    found = {"G": Training(Setup("demo", 4), in_types(OUR_SETTINGS), CPU).step("G", reference.batch)}
    reference.check_step(FLOAT32, found)
    with pytest.raises(MismatchError):
        reference.check_step(FLOAT32, {**found, "G": [g * 1.4 for g in found["G"]]})


def test_an_iteration_is_both_steps_and_a_sixteenth_of_r1(monkeypatch):
    """All of it compared, and timed by its shares; R1, which only some iterations have, stays out of a peer's graph."""
    graphs = []
    monkeypatch.setattr(Training, "captured", lambda training, call: graphs.append(call) or call)
    settings = replace(in_types(OUR_SETTINGS), engine="graph")
    bench = settings_bench("iteration", Setup("demo", 2), {"graph": settings}, CPU)
    call = bench.peers["graph"]()
    assert [share for _, share in call.parts] == [1, 1 / 16]
    first = call()
    assert list(first) == ["G", "D", "R1"] and call() is None
    bench.checks["graph"](first)
    assert len(graphs) == 2 and all(list(graph()) == ["G", "D"] for graph in graphs)


class FakeCuda:
    """What capturing asks of torch.cuda, noted in order; a capture computes at once, and a replay does nothing."""

    def __init__(self, monkeypatch):
        self.noted = []
        for name in ("current_stream", "Stream", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, self._noting(name))

    def _noting(self, name):
        def call(*arguments):
            self.noted.append(name)
            return self

        return call

    def wait_stream(self, other):
        self.noted.append("wait")

    def replay(self):
        self.noted.append("replay")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.noted.append("end")


@pytest.mark.parametrize("step", ["G step", "D step", "iteration"])
def test_a_captured_step_begins_where_its_warm_up_did(monkeypatch, step):
    settings = in_types(STOCK_SETTINGS)
    expected = Training(Setup("demo", 2), settings, CPU)
    want = step_parts(step, expected, Batch.draw(expected))[0][0]()
    training = Training(Setup("demo", 2), replace(settings, engine="graph"), CPU)
    fake, gradients_before = FakeCuda(monkeypatch), []
    work, _ = step_parts(step, training, Batch.draw(training))[0]
    replayed = training.captured(lambda: (gradients_before.append(fake.noted[-1]), work())[1])
    assert gradients_before == ["stream"] * 3 + ["graph"]
    assert fake.noted.count("wait") == 2 and "replay" not in fake.noted
    found = replayed()
    assert fake.noted[-1] == "replay" and training.optimizers[0].param_groups[0]["capturable"]
    for name in want:
        for a, b in zip(found[name], want[name], strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_peers_of_training_on_a_gpu(monkeypatch):
    """Stock eager, as a graph, and compiled in a case of its own; R1 differentiates twice and stays eager."""
    built = {}

    def bench(step, setup, peers, device, compared=None):
        return built.setdefault((step, compared), {name: s.engine for name, s in peers.items()})

    monkeypatch.setattr("benchmarks.cases.training_cases.settings_bench", bench)
    gpu, setup = torch.device("cuda"), Setup("cifar10-uncond-gdd-i", 128)
    for case in [*training_cases(True), *compiled_training()]:
        if setup.preset in case.name and "batch 128" in case.name:
            case.build(gpu)
    eager = {"official": "eager", "stock": "eager", "gdd_fast": "eager"}
    both = {"compile": "compile", "max-autotune": "max-autotune"}
    assert built == {
        ("R1 step", None): eager,
        **{(step, None): {**eager, "graph": "graph"} for step in ("iteration", "G step", "D step")},
        **{(step, 128): both for step in ("iteration", "G step", "D step")},
    }
    assert {s.engine for s in settings_for(CPU).values()} == {"eager"}


def test_compiled_losses_are_the_losses(monkeypatch):
    """The calls around the compiler: its modes, and that a new step is announced before each."""
    asked, steps = [], []

    def compile(function, *, dynamic, mode):
        asked.append((function.__name__, dynamic, mode))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(len(asked)))
    settings = in_types(STOCK_SETTINGS)
    eager = Training(Setup("demo", 2), settings, CPU)
    training = Training(Setup("demo", 2), replace(settings, engine="max-autotune"), CPU)
    assert asked == [("_generator_loss", False, "max-autotune"), ("_discriminator_loss", False, "max-autotune")]
    batch = Batch.draw(eager)
    for step in ("G", "D"):
        for a, b in zip(training.step(step, batch), eager.step(step, batch), strict=True):
            assert torch.equal(a, b)
    assert len(steps) == 2


def test_stock_adam_leaves_everything_as_it_was_for_a_gradient_that_is_not_finite():
    weight = torch.ones(3, requires_grad=True)
    adam = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.tensor([1.0, float("inf"), 1.0])
    peers.step_if_finite(adam, [weight.grad])
    assert weight.tolist() == [1, 1, 1] and not float(adam.state[weight]["step"])
    weight.grad = torch.ones(3)
    peers.step_if_finite(adam, [weight.grad])
    assert (weight < 1).all() and float(adam.state[weight]["step"]) == 1


def test_a_training_that_is_not_timed_tries_no_algorithms():
    for trials in (False, True):
        training, seen = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU, trials=trials), []
        training._losses["G"] = lambda *_, seen=seen: seen.append(torch.backends.cudnn.benchmark)
        with pytest.raises(AttributeError):
            training.step("G", Batch(None, None, None))
        assert seen == [trials]
