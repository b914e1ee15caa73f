"""`--engine compile`: compiled G and D steps of a run are as near to float64 as eager ones, and compiled once each.

The rule and the run in float64 are those of test_fused_training.py.
"""

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from test_fused_training import SLOWLY, Race, config_for, noisy
from tiny_run import tiny_config
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

from gdd_fast.config import override
from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.errors import BackendError
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.models.backbones import Backbone
from gdd_fast.models.discriminator import ProjectedFeatures
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.training import checkpoint, compiled_losses

pytestmark = pytest.mark.usefixtures("plain")

SKIPPED, SAVED = 2, 4


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class FourConvolutions(Backbone):
    """What the compiler meets in the real ones, in a thirteenth of the layers."""

    name, tap_channels, tap_strides = "four", (4, 8, 8, 8), (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, *self.tap_channels), (4, 2, 2, 2)
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.layers = nn.ModuleList(FrozenConv2d(i, o, s + 1, stride=s, padding=s // 2) for i, o, s in pairs)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x, "relu6")
            maps.append(x)
        return tuple(maps)


class Interrupted(Race):
    """Runs in which a step of G and one of D are skipped, and which go on from a checkpoint."""

    def train(self, task: Distillation) -> list[float]:
        losses, batch = [], self.config.run.batch
        for number in range(self.steps):
            if number == SKIPPED:
                overflow(task.g_guard)
                overflow(task.d_guard)
            if number == SAVED:
                sections, values = task.state()
                path = self.config.run_dir.parent / "state"
                checkpoint.save(path, sections, {**values, "images": number * batch})
                task.iteration(number * batch)  # which the checkpoint does not know of
                task.averages.take()
                task.restore(checkpoint.load(path))
            task.iteration(number * batch)
            losses += [value for value in task.averages.take().values() if math.isfinite(value)]
        assert [guard.skipped for guard in (task.g_guard, task.d_guard, task.r1_guard)] == [1, 1, 0]
        return losses


def overflow(guard):
    """The next step of this guard has a gradient with an infinity."""
    apply = guard.apply

    def once():
        guard.optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        guard.apply = apply
        return apply()

    guard.apply = once


def check_compiled(race: Race, backend: str, capsys) -> None:
    race.config = override(race.config, engine="compile")
    found = race.run(backend)
    race.check(found)
    assert counters["stats"]["unique_graphs"] == 2  # whatever came between: R1, skipped steps, a checkpoint
    said = "G and D steps are compiled; R1 steps run eagerly, as second derivatives do not compile\n"
    assert capsys.readouterr().err == said


def test_a_compiled_run_follows_the_eager_one(tmp_path, monkeypatch, capsys):
    """The compiler's front ends, which make the backward pass; the code that it generates is the slow test's."""
    monkeypatch.setattr(compiled_losses, "COMPILER", "aot_eager")
    check_compiled(small_race(tmp_path), "torch", capsys)


def small_race(tmp_path) -> Interrupted:
    sizes = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
    net = noisy(EDMPrecond(4, 1, **ncsnpp(**sizes)))
    config = override(config_for(tmp_path, net), r1_interval=3, batch_gpu=2)
    built = components.build(config)
    torch.manual_seed(0)
    built.features = built.r1_features = ProjectedFeatures([FourConvolutions()], 32)
    built.heads = components.build_heads(config, built.features, 0, {})
    return Interrupted(config, built, 6)


@pytest.mark.slow
def test_a_run_by_inductor_follows_the_eager_one(inputs, capsys):
    """With a real backbone, and with what `auto` takes on this machine for the operators."""
    config = override(tiny_config(inputs, **SLOWLY), r1_interval=3)
    check_compiled(Interrupted(config, components.build(config), 6), "auto", capsys)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_does_not_compile_is_an_error_that_names_the_step(direction, monkeypatch):
    """The backward pass is compiled when it first runs."""

    def refuse(graph, inputs):
        raise InductorError(RuntimeError("no code for it"), None)

    keep = lambda graph, inputs: make_boxed_func(graph.forward)
    passes = (refuse, keep) if direction == "forward" else (keep, refuse)
    compiler = aot_autograd(**dict(zip(("fw_compiler", "bw_compiler"), passes, strict=True)))
    monkeypatch.setattr(compiled_losses, "COMPILER", compiler)
    loss = compiled_losses.compiled(lambda x: x.square().sum())
    with (
        pytest.raises(BackendError, match=r"fails at the G step \(\w+: .*no code for it.*; use --engine eager"),
        compiled_losses.compiling("G"),
    ):
        loss(torch.ones(2, requires_grad=True)).backward()
