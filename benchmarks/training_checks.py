"""Whether a training step computes what the public code's does in float32, in float32 and in the types that are timed.

The rule is that of parity, gradient by gradient (`checks.Gradients`): at most twice the error of plain PyTorch in the
same types. In bf16 that needs care. Rounding opens and closes ReLUs of the frozen networks, and the gradient that plain
PyTorch brings back through them to the images differs from float32's by half its norm or more; beside that, any mistake
of the generator would pass. So the G step is compared in halves, each given what the other makes of it in float32: the
gradient of the images, and for float32's gradient of the images that of every weight. The D and R1 steps are
compared as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import Gradients
from benchmarks.training import OFFICIAL_SETTINGS, STOCK_SETTINGS, Settings, Setup, Training

FLOOR = 0.1
"""float32 alone differs by some percent between memory formats: kinks, and batch norms over few images."""
_FLOOR_OF_WEIGHTS = 0.01  # behind a given gradient of the images there are neither

Gradient = dict[str, list[Tensor]]
"""Of one step or several, by the step's name."""


@dataclass(frozen=True)
class Batch:
    """The inputs of an iteration: latents, real images in [-1, 1], labels or None."""

    z: Tensor
    real: Tensor
    labels: Tensor | None

    @classmethod
    def draw(cls, training: Training) -> "Batch":
        generator = torch.Generator(training.device).manual_seed(1)
        options = {"device": training.device, "generator": generator}
        z, noise = (torch.randn(training.shape, **options) for _ in range(2))
        labels = None
        if training.label_dim:
            classes = torch.arange(len(z), device=training.device) % training.label_dim
            labels = torch.eye(training.label_dim, device=training.device)[classes]
        return cls(z, noise.clamp(-1, 1), labels)


def step_call(step: str, training: Training, batch: Batch) -> Callable[[], Gradient]:
    """The gradients that a step computed and applied."""
    z, real, labels = batch.z, batch.real, batch.labels
    match step:
        case "G step":
            return lambda: {"G": training.generator_step(z, labels)}
        case "D step":
            return lambda: {"D": training.discriminator_step(z, real, labels)}
        case "R1 step":
            return lambda: {"R1": training.r1_step(real, labels)}
    return lambda: {"G": training.generator_step(z, labels), "D": training.discriminator_step(z, real, labels)}


def in_float32(settings: Settings) -> Settings:
    """The same code in float32 throughout, and eager: compilers and graphs are PyTorch's own affair."""
    wide = {"generator_dtype": torch.float32, "discriminator_dtype": torch.float32}
    return replace(settings, **wide, tf32=False, engine="eager")


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


class Reference:
    """One step of the public code's settings in float32, and the rules for peers by the types they compute in.

    `trials` as of `Training`.
    """

    def __init__(self, step: str, setup: Setup, device: torch.device, *, trials: bool = False) -> None:
        self._step, self._setup, self._device, self._trials = step, setup, device, trials
        settings = in_float32(OFFICIAL_SETTINGS)
        training = self._training(settings)
        self.batch = Batch.draw(training)
        self._images = training.images(self.batch.z, self.batch.labels)
        self._image_gradient: Tensor | None = None
        self._halves = self._probe(training)
        self._image_gradient = self._halves.get("images", [None])[0]
        self._whole = {name: _copied(g) for name, g in self._run(settings)().items()}
        self._exact = self._rules(self._whole, self._run(in_float32(STOCK_SETTINGS))())
        self._rules_of: dict[Types, dict[str, Gradients]] = {}
        self._sizes_of: dict[Types, dict[str, Gradients]] = {}

    def check_in_float32(self, settings: Settings) -> str:
        """Raise MismatchError or UncheckedError unless the step in float32 is right; returns what was compared."""
        for rule in self._exact.values():
            rule.require_values()
        for name, gradients in self._run(in_float32(settings))().items():
            self._exact[name].check(gradients)
        return _counted(self._exact)

    def check_in(self, types: Types, settings: Settings) -> str:
        """The same in `types`, the G step in halves."""
        rules = self._rules_in(types)
        if "G" in rules:
            rules["G"].require_values()
        for name, gradients in self._probe(self._training(_of_types(settings, types))).items():
            rules[name].check(gradients)
        return _counted(rules)

    def check_step(self, types: Types, found: Gradient) -> None:
        """The outputs of a whole step that is timed in `types`.

        In 16 bits of a G step, and of what follows it in an iteration, no more than the size of every gradient.
        """
        for name, gradients in found.items():
            if types == FLOAT32:
                self._exact[name].check(gradients)
            elif name == "G" or self._step == "iteration":
                self._sizes_in(types)[name].check_sizes(gradients)
            else:
                self._rules_in(types)[name].check(gradients)

    def _run(self, settings: Settings) -> Callable[[], Gradient]:
        return step_call(self._step, self._training(settings), self.batch)

    def _training(self, settings: Settings) -> Training:
        return Training(self._setup, settings, self._device, trials=self._trials)

    def _probe(self, training: Training) -> Gradient:
        """The gradients of the step, of G's in halves; G and D before either is updated."""
        z, real, labels = self.batch.z, self.batch.real, self.batch.labels
        found: Gradient = {}
        if self._step in ("G step", "iteration"):
            found["images"] = [training.image_gradient(self._images, labels)]
            upstream = found["images"][0] if self._image_gradient is None else self._image_gradient
            found["G"] = training.weight_gradients(z, labels, upstream)
        if self._step in ("D step", "iteration"):
            found["D"] = training.discriminator_step(z, real, labels)
        if self._step == "R1 step":
            found["R1"] = training.r1_step(real, labels)
        return {name: _copied(gradients) for name, gradients in found.items()}

    def _rules_in(self, types: Types) -> dict[str, Gradients]:
        """Plain PyTorch is run in `types` once."""
        if types not in self._rules_of:
            plain = _of_types(in_float32(STOCK_SETTINGS), types)
            eager = self._probe(self._training(plain))
            self._rules_of[types] = self._rules(self._halves, eager)
        return self._rules_of[types]

    def _sizes_in(self, types: Types) -> dict[str, Gradients]:
        if types not in self._sizes_of:
            plain = _of_types(in_float32(STOCK_SETTINGS), types)
            self._sizes_of[types] = self._rules(self._whole, self._run(plain)())
        return self._sizes_of[types]

    @staticmethod
    def _rules(expected: Gradient, eager: Gradient) -> dict[str, Gradients]:
        halves = "images" in expected
        return {
            name: Gradients(gradients, _FLOOR_OF_WEIGHTS if halves and name == "G" else FLOOR, eager[name])
            for name, gradients in expected.items()
        }


def _of_types(settings: Settings, types: Types) -> Settings:
    dtypes = {"generator_dtype": types.generator, "discriminator_dtype": types.discriminator}
    return replace(settings, **dtypes, tf32=types.tf32, engine="eager")


def _copied(gradients: list[Tensor]) -> list[Tensor]:
    return [g.detach().float().clone() for g in gradients]


def _counted(rules: dict[str, Gradients]) -> str:
    parts = [f"{rule.in_value} of {len(rule)} gradients of {name}" for name, rule in rules.items() if name != "images"]
    return ", ".join(parts) + " in value"
