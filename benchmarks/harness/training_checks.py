"""Whether a training step computes what the public code's does in float32, in float32 and in the types that are timed.

The rule is that of networks (`checks.Closeness`): over all gradients of a step together, at most twice the error of
plain PyTorch in the same types. Single layers are the business of tests/distill/test_fused_training.py. Two things
would let a mistake pass or make a fault of rounding, in float32 already:

Rounding opens and closes ReLUs of the frozen networks. The gradient that plain PyTorch brings back through them to the
images differs from the definition's by up to a percent of its norm in float32 and by half of it in bf16. So the G step
is compared in halves, each given what the other makes of it in float32: the gradient of the images, and for float32's
gradient of the images that of every weight, which has no kink behind it.

Adam's first step is the learning rate times a gradient's sign. Where a gradient is nearly 0, that percent turns the
sign over, and what is computed with the new weights is a tenth off. So all steps are compared as they are before any is
taken, and of a step that is timed only the first gradients are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.checks import Closeness
from benchmarks.peers.training import OFFICIAL_SETTINGS, STOCK_SETTINGS, Settings, Setup, Training

FLOOR = 0.1
"""float32 alone differs by some percent between memory formats: kinks, and batch norms over few images."""
_FLOOR_OF_WEIGHTS = 3e-3
"""Of G, given the gradient of the images: neither is behind that. float32 alone differs by 1e-5 on a CPU."""
_FLOOR_OF_WHOLE = 0.3
"""Allowed for a whole G step: the kinks cost its smallest gradients 0.07 of their norm with four images."""

Gradient = dict[str, list[Tensor]]
"""The gradients of one step or several, by the step's name."""


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


def step_parts(step: str, training: Training, batch: Batch) -> list[tuple[Callable[[], Gradient], float]]:
    """The gradients that a step computes and applies; of an iteration, what each one has and the share it has of R1."""
    z, real, labels = batch.z, batch.real, batch.labels

    def generator() -> Gradient:
        return {"G": training.generator_step(z, labels)}

    def discriminator() -> Gradient:
        return {"D": training.discriminator_step(z, real, labels)}

    def r1() -> Gradient:
        return {"R1": training.r1_step(real, labels)}

    if step == "iteration":
        interval = training.setup.config.loss.r1_interval
        return [(lambda: generator() | discriminator(), 1.0), (r1, 1.0 / interval)]
    return [({"G step": generator, "D step": discriminator, "R1 step": r1}[step], 1.0)]


def step_call(step: str, training: Training, batch: Batch) -> Callable[[], Gradient]:
    """All parts of a step, one after the other."""
    parts = step_parts(step, training, batch)
    return lambda: {name: gradients for part, _ in parts for name, gradients in part().items()}


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
        self._rules_of: dict[tuple[Types, bool], dict[str, Closeness]] = {}

    def check_in(self, types: Types, settings: Settings) -> None:
        """Raise MismatchError unless the step under `settings`, but in `types`, is right; the G step in halves."""
        for name, gradients in self._probe(self._training(_of_types(settings, types))).items():
            self._rules(types, whole=False)[name].check(gradients)

    def check_step(self, types: Types, found: Gradient) -> None:
        """Raise MismatchError unless the first gradients of a whole step that is timed in `types` are right."""
        first = next(iter(found))
        self._rules(types, whole=True)[first].check(found[first])

    def _run(self, settings: Settings) -> Callable[[], Gradient]:
        return step_call(self._step, self._training(settings), self.batch)

    def _training(self, settings: Settings) -> Training:
        return Training(self._setup, settings, self._device, trials=self._trials)

    def _probe(self, training: Training) -> Gradient:
        """The gradients of the step, of G's in halves; of an iteration each before any is applied."""
        z, real, labels = self.batch.z, self.batch.real, self.batch.labels
        found: Gradient = {}
        if self._step in ("G step", "iteration"):
            found["images"] = [training.image_gradient(self._images, labels)]
            upstream = found["images"][0] if self._image_gradient is None else self._image_gradient
            found["G"] = training.weight_gradients(z, labels, upstream)
        put_back = training.undo()
        if self._step in ("D step", "iteration"):
            found["D"] = training.discriminator_step(z, real, labels)
        if self._step in ("R1 step", "iteration"):
            put_back()
            found["R1"] = training.r1_step(real, labels)
        return {name: _copied(gradients) for name, gradients in found.items()}

    def _rules(self, types: Types, *, whole: bool) -> dict[str, Closeness]:
        """By the step's name; plain PyTorch is run in `types` once."""
        if (types, whole) not in self._rules_of:
            plain = _of_types(STOCK_SETTINGS, types)
            expected, eager = self._halves, None
            if whole:
                expected, eager = self._whole, self._run(plain)()
            eager = eager or self._probe(self._training(plain))
            floors = {"G": _FLOOR_OF_WHOLE if whole else _FLOOR_OF_WEIGHTS}
            self._rules_of[types, whole] = {
                name: Closeness(gradients, floors.get(name, FLOOR), eager[name]) for name, gradients in expected.items()
            }
        return self._rules_of[types, whole]


def _of_types(settings: Settings, types: Types) -> Settings:
    """The same code in other types, and eager: compilers and graphs are PyTorch's own affair."""
    dtypes = {"generator_dtype": types.generator, "discriminator_dtype": types.discriminator}
    return replace(settings, **dtypes, tf32=types.tf32, engine="eager")


def in_float32(settings: Settings) -> Settings:
    """The same code in float32 throughout, and eager."""
    return _of_types(settings, FLOAT32)


def _copied(gradients: list[Tensor]) -> list[Tensor]:
    return [g.detach().float().clone() for g in gradients]
