"""Whether a training step computes what the public code's does in float32, in float32 and in the types that are timed.

The rule is that of networks (`checks.Closeness`): over all gradients of a step together, at most twice the error of
plain PyTorch in the same types. Single layers are the business of tests/distill/test_fused_training.py. Two things
would let a mistake pass or make a fault of rounding, in float32 already:

Rounding opens and closes ReLUs of the frozen networks. The gradient that plain PyTorch brings back through them to the
images differs from the definition's by up to a percent of its norm in float32, and in bf16 by half of it for the demo's
64x64 and by all of it at 224x224, with random weights and published ones alike. So the G step is compared
in halves, each given what the other makes of it in float32: the gradient of the images, and for float32's
gradient of the images that of every weight, which has no kink behind it.

Adam's first step is the learning rate times a gradient's sign. Where a gradient is nearly 0, that percent turns the
sign over, and what is computed with the new weights is a tenth off. So no step is applied before it is compared, and of
a step that is timed only the first gradients are.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.checks import Closeness
from benchmarks.peers.training import OFFICIAL_SETTINGS, STOCK_SETTINGS, Batch, Settings, Setup, Training

IMAGES, WEIGHTS = "gradient of the images", "weights of G"
"""The halves of a G step."""
FLOOR = 0.1
"""float32 alone differs by some percent between memory formats: kinks, and batch norms over few images."""
_FLOORS = {WEIGHTS: 3e-3, "G": 0.3}
"""No kink is behind the first, and float32 alone differs by 1e-5 on a CPU. The second is of a whole G step, whose
smallest gradients kinks cost 0.07 of their norm with four images."""

Gradient = dict[str, list[Tensor]]
"""The gradients of one step or several, by the step's name."""


def step_parts(step: str, training: Training, batch: Batch) -> list[tuple[Callable[[], Gradient], float]]:
    """The gradients that a step computes and applies; of an iteration, what each one has and the share it has of R1."""

    def run(*names: str) -> Callable[[], Gradient]:
        return lambda: {name: training.step(name, batch) for name in names}

    if step == "iteration":
        return [(run("G", "D"), 1.0), (run("R1"), 1.0 / training.setup.config.loss.r1_interval)]
    return [(run(step.removesuffix(" step")), 1.0)]


class Types(NamedTuple):
    """What is rounded to what: the compute types of generator and discriminator, and whether float32 means TF32."""

    generator: torch.dtype
    discriminator: torch.dtype
    tf32: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Types":
        wide = torch.float32 in (settings.generator_dtype, settings.discriminator_dtype)
        return cls(settings.generator_dtype, settings.discriminator_dtype, settings.tf32 and wide)

    def __str__(self) -> str:
        names = [str(t).removeprefix("torch.") for t in dict.fromkeys(self[:2])]
        return " and ".join([*names, *["TF32"] * self.tf32])


FLOAT32 = Types(torch.float32, torch.float32)


def in_types(settings: Settings, types: Types = FLOAT32) -> Settings:
    """The same code in other types, and eager: compilers and graphs are PyTorch's own affair."""
    dtypes = {"generator_dtype": types.generator, "discriminator_dtype": types.discriminator}
    return replace(settings, **dtypes, tf32=types.tf32, engine="eager")


class Reference:
    """One step of the public code's settings in float32, and the rules for peers by the types they compute in.

    `trials` as of `Training`.
    """

    def __init__(self, step: str, setup: Setup, device: torch.device, *, trials: bool = False) -> None:
        self._names = ("G", "D", "R1") if step == "iteration" else (step.removesuffix(" step"),)
        self._new = lambda settings: Training(setup, settings, device, trials=trials)
        official = self._new(in_types(OFFICIAL_SETTINGS))
        self.batch = Batch.draw(official)
        self._images, self._upstream = official.images(self.batch), None
        self._expected = self._gradients(official)
        self._upstream = self._expected.get(IMAGES, [None])[0]
        self._rules_in: dict[Types, dict[str, Closeness]] = {}

    def check_in(self, types: Types, settings: Settings) -> None:
        """Raise MismatchError unless the step under `settings`, but in `types`, is right; the G step in halves."""
        rules = self._rules(types)
        for name, gradients in self._gradients(self._new(in_types(settings, types))).items():
            rules[name].check(gradients)

    def check_step(self, types: Types, found: Gradient) -> None:
        """Raise MismatchError unless the first gradients of a whole step that is timed in `types` are right."""
        first = next(iter(found))
        self._rules(types)[first].check(found[first])

    def _gradients(self, training: Training) -> Gradient:
        """The gradients of the step, none of them applied, and those of G's halves."""
        found = {name: _copied(training.gradients(name, self.batch)) for name in self._names}
        if "G" in self._names:
            found[IMAGES] = _copied([training.image_gradient(self._images, self.batch.labels)])
            upstream = found[IMAGES][0] if self._upstream is None else self._upstream
            found[WEIGHTS] = _copied(training.weight_gradients(self.batch, upstream))
        return found

    def _rules(self, types: Types) -> dict[str, Closeness]:
        """By the step's name; plain PyTorch is run in `types` once."""
        if types not in self._rules_in:
            eager = self._gradients(self._new(in_types(STOCK_SETTINGS, types)))
            self._rules_in[types] = {
                name: Closeness(expected, _FLOORS.get(name, FLOOR), eager[name])
                for name, expected in self._expected.items()
            }
        return self._rules_in[types]


def _copied(gradients: list[Tensor]) -> list[Tensor]:
    return [g.detach().float().clone() for g in gradients]
