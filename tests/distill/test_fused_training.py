"""Twenty steps of distillation by the training loop itself, all operators fused against all in plain PyTorch.

Both runs are `Distillation`: all of a run, from the discriminator's input to the optimizer and the bytes of
the sample grid. A third is the same program in float64, the definitions throughout. The rule is the one of parity.py:
what comes out of the fused run is at most twice as far from float64 as what comes out of eager PyTorch in float32.

What is compared is what the trained networks do (images, logits), computed in float64 for all runs, and the losses on
the way. Weights are no measure: Adam divides by the gradient's size, so those without effect, such as biases before a
batch norm, whose gradient is rounding alone, take full steps in random directions.

The learning rates are a tenth of the presets' or less. At 1e-3 the demo's R1 steps multiply rounding until float32
itself leaves float64 within ten steps, and every comparison passes or fails by chance; at 1e-5 float32 stays within
1e-4 of the way that the networks go, and an operator that is wrong by one per cent shows. What remains is a ReLU of the
backbone that is open in one run and closed in another, which no precision excludes: hence `FLOOR`.
"""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gdd_fast.backend import Backend, Operator, obstacle
from gdd_fast.config import TrainConfig, override, preset
from gdd_fast.data import write_edm_zip
from gdd_fast.device import gpu_arithmetic
from gdd_fast.distill import components, gdd
from gdd_fast.distill.components import OPERATORS, Components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.layers import convolution, frozen_conv, self_attention
from gdd_fast.layers.backends import choose_backend
from gdd_fast.models.backbone_input import BackboneInput
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.ops import adam_ema as ops_adam_ema
from gdd_fast.ops import group_norm_silu, residual
from gdd_fast.ranks import World
from gdd_fast.sampling.sampler import one_step
from gdd_fast.training import optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 20
FLOOR = 1e-3
"""A share of the way, or of the losses and bytes themselves, that is never too far off."""
FUSED, TRITON = Operator("a", fused=frozenset({"cuda", "cpp"})), Operator("b", fused=frozenset({"triton"}))
needs_extension = pytest.mark.skipif(
    obstacle(FUSED, "cuda" if DEVICE.type == "cuda" else "cpp", DEVICE.type) is not None,
    reason="the extension gdd_fast._C is not built for this device",
)
pytestmark = pytest.mark.usefixtures("plain")


class InFloat64(TorchFunctionMode):
    """A program under this computes in float64 wherever it says float32. Random numbers stay what they were."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 and function is not torch.randn else value

        function = Tensor.double if function is Tensor.float else function
        y = function(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})
        return y.double() if isinstance(y, Tensor) and y.dtype == torch.float32 else y


def in_float64(built: Components) -> Components:
    """A copy whose networks compute in float64 by their definitions."""
    own = copy.deepcopy(built)
    for net in (own.generator, own.features, own.heads):
        net.double()
    own.generator.dtype = own.heads.dtype = torch.float64
    choose_backend("torch", DEVICE.type, [own.generator, own.features, own.heads])
    return own


class Race:
    """Runs of one configuration from one start."""

    def __init__(self, config: TrainConfig, built: Components, steps: int = STEPS) -> None:
        self.config, self.built, self.steps = config, built, steps
        self._judges = in_float64(built)
        shape = (config.run.batch, built.generator.img_channels, *[built.generator.img_resolution] * 2)
        self._z, self._x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        start = self._functions(built.generator, built.generator, built.heads)
        self.exact, self.eager = self.run("float64"), self.run("torch")
        self._way = {name: (y - start.get(name, 0)).norm().item() for name, y in self.exact.items()}

    def run(self, backend: Backend | str) -> dict[str, Tensor]:
        """Losses, bytes of the sample grid, and in float64 what the networks do after so many steps."""
        wide = backend == "float64"
        own = in_float64(self.built) if wide else copy.deepcopy(self.built)
        nets = [own.generator, own.features, own.heads]
        own.operators = choose_backend("torch" if wide else backend, DEVICE.type, nets, OPERATORS)
        sheets: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(gpu_arithmetic(self.config.generator.g_precision))
            patch.setattr(gdd, "save_grid", lambda pixels, path: sheets.append(pixels))
            patch.setattr(gdd, "GRID_SEEDS", range(self.config.run.batch))
            task = Distillation(self.config, own, World(0, 1, DEVICE))
            if wide:
                patch.setattr(ops_adam_ema, "_check_like", lambda *_: None)  # it asks for float32
                stack.enter_context(InFloat64())
            losses = self.train(task)
            task.tick(self.steps * self.config.run.batch)
        functions = self._functions(task.generator, task.ema.net, task.heads)
        return {"losses": torch.tensor(losses, dtype=torch.float64), "bytes": sheets[0].double().cpu(), **functions}

    def train(self, task: Distillation) -> list[float]:
        """All steps; what they log."""
        losses: list[float] = []
        for number in range(self.steps):
            task.iteration(number * self.config.run.batch)
            losses += task.averages.take().values()
        assert not any(guard.skipped for guard in (task.g_guard, task.d_guard, task.r1_guard))
        return losses

    def distances(self, found: dict[str, Tensor]) -> dict[str, float]:
        """How far from the run in float64, as a share of the way that one went."""
        return {name: (y - self.exact[name]).norm().item() / self._way[name] for name, y in found.items()}

    def check(self, found: dict[str, Tensor]) -> None:
        """Assert the rule, and that it tells one run from another."""
        allowed = {name: max(FLOOR, 2 * error) for name, error in self.distances(self.eager).items()}
        assert max(allowed.values()) < 0.02, f"eager float32 itself does not follow float64: {allowed}"
        errors = self.distances(found)
        assert not {name: error for name, error in errors.items() if not error <= allowed[name]}, (errors, allowed)

    @torch.no_grad()
    def _functions(self, generator: nn.Module, average: nn.Module, heads: nn.Module) -> dict[str, Tensor]:
        """Images of generator and average, logits of the heads, all computed in float64 on the CPU."""
        judges, found = self._judges, {}
        for name, net in (("images", generator), ("averaged images", average)):
            judges.generator.load_state_dict(net.state_dict())
            with InFloat64():
                found[name] = one_step(judges.generator.eval(), self._z)
        judges.heads.load_state_dict(heads.state_dict())
        maps = judges.heads.eval()(judges.features(self._x))
        found["logits"] = torch.cat([head.flatten() for backbone in maps for head in backbone])
        return found


def race(config: TrainConfig, steps: int = STEPS) -> Race:
    return Race(override(config, r1_interval=4), components.build(config), steps)


SLOWLY = {"g_lr": 1e-5, "d_lr": 1e-5}


@pytest.fixture(scope="module")
def short(inputs):
    """Five steps, the last of them with R1's: enough to tell a wrong operator."""
    return race(tiny_config(inputs, **SLOWLY), steps=5)


@needs_extension
def test_twenty_fused_steps_are_as_near_to_float64_as_eager_torchs(inputs):
    twenty = race(tiny_config(inputs, **SLOWLY))
    fused = twenty.run("auto")
    twenty.check(fused)
    assert not torch.equal(fused["images"], twenty.eager["images"])  # another implementation has run


def one_per_cent_more(result: Any) -> Any:
    """A wrong result: of several tensors all, of a map with its statistics the map."""
    if isinstance(result, tuple):
        return result[0] * 1.01, *result[1:]
    return [y * 1.01 for y in result] if isinstance(result, list) else result * 1.01


def wrong_result(function: Callable) -> Callable:
    return lambda *arguments, **options: one_per_cent_more(function(*arguments, **options))


def wrong_gradient(function: Callable) -> Callable:
    def called(*arguments, **options):
        y = function(*arguments, **options)
        if y.requires_grad:
            y.register_hook(one_per_cent_more)
        return y

    return called


def wrong_argument(index: int) -> Callable:
    def wrapped(function: Callable) -> Callable:
        def called(*arguments, **options):
            return function(*arguments[:index], arguments[index] * 1.01, *arguments[index + 1 :], **options)

        return called

    return wrapped


MISTAKES = {
    "group_norm_silu": (group_norm_silu, "group_norm_silu", wrong_result),
    "gradient of group_norm_silu": (group_norm_silu, "group_norm_silu", wrong_gradient),
    "resample2d": (convolution, "resample2d", wrong_result),
    "residual": (residual, "residual", wrong_result),
    "attention": (self_attention, "attention", wrong_result),
    "BackboneInput": (BackboneInput, "forward", wrong_result),
    "frozen_conv2d_relu": (frozen_conv, "frozen_conv2d_relu", wrong_result),
    "learning rate of adam_ema": (optimizer, "adam_ema_", wrong_argument(6)),
    "to_uint8": (gdd, "to_uint8", wrong_argument(0)),
}


@needs_extension
@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_an_operator_that_is_wrong_by_one_per_cent_fails(short, mistake, monkeypatch):
    if mistake is None:
        short.check(short.run("auto"))
        return
    place, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong(getattr(place, name)))
    with pytest.raises(AssertionError):
        short.check(short.run("auto"))


def noisy(net: EDMPrecond) -> EDMPrecond:
    """No weight at zero: EDM's start has blocks that do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return net


def config_for(folder: Path, net: EDMPrecond, **settings: Any) -> TrainConfig:
    """A run with `net` as the teacher, on noise of its size."""
    save_network(net, folder / "teacher")
    shape = (24, net.img_channels, net.img_resolution, net.img_resolution)
    write_edm_zip(folder / "data.zip", np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    return tiny_config(folder, **SLOWLY, **settings)


@pytest.mark.skipif(obstacle(TRITON, "triton", DEVICE.type) is not None, reason="no Triton for this device")
@pytest.mark.slow
def test_twenty_steps_by_the_triton_kernels(tmp_path):
    """Without a GPU in the interpreter, hence the smallest network that has all of them: its heads have 16 channels."""
    sizes = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
    net = noisy(EDMPrecond(4, 1, **ncsnpp(**sizes)))
    twenty = race(config_for(tmp_path, net, batch=2))
    twenty.check(twenty.run("triton"))


@needs_extension
@pytest.mark.slow
def test_twenty_steps_of_the_demo(tmp_path):
    """The bundled teacher and data; fewer images at once and other rates than the preset's, see above."""
    twenty = race(override(preset("demo"), run_dir=tmp_path, device=DEVICE.type, batch=8, **SLOWLY))
    twenty.check(twenty.run("auto"))
