"""Cases of training: the three steps and a whole iteration of a preset, under the settings of training.py.

A peer is checked twice, on few images, before it is timed. Its settings in float32, which run the same code but for the
type, have to give every gradient of the public code's settings; a case of which too few gradients can be compared gets
no time. In bf16, rounding is amplified through two networks until some gradients of plain PyTorch point elsewhere: of
those the norm alone is compared (`checks.Gradients`), and the row says how many were compared in value. From the second
step on the weights have moved apart, and nothing is compared. Rounding in bf16 is the operators' to check.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Bench, Case
from benchmarks.checks import Gradients
from benchmarks.timing import Call
from benchmarks.training import OFFICIAL_SETTINGS, OUR_SETTINGS, STOCK_SETTINGS, Settings, Setup, Training

STEPS = ("G step", "D step", "R1 step", "iteration")
_COMPARED_IMAGES = 16
FLOOR = 0.1
"""float32 alone differs by some percent between memory formats: kinks, and batch norms over few images."""


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


def training_cases(full: bool, steps: tuple[str, ...] = STEPS) -> list[Case]:
    """On a CPU the demo's steps; `full` the CIFAR-10 preset's, then others."""
    if not full:
        return [training_case(step, Setup("demo", 16)) for step in steps]
    setup = Setup("cifar10-uncond-gdd-i", 128)
    cases = [training_case(step, setup) for step in ("iteration", "G step", "R1 step", "D step")]
    more = (Setup("cifar10-uncond-gdd-i", 256), Setup("cifar10-uncond-gdd", 128), Setup("imagenet-64-gdd-i", 64))
    return [*cases, *(training_case("iteration", s) for s in more), training_case("iteration", setup, compiled=True)]


def training_case(step: str, setup: Setup, *, compiled: bool = False) -> Case:
    """One step; `compiled` measures torch.compile of the stock networks alone, which takes minutes to get ready."""
    title = f"{setup.preset} batch {setup.batch}"
    return Case(step, title, partial(_bench, step, setup, compiled))


def settings_for(device: torch.device) -> dict[str, Settings]:
    """The peers. On a CPU all compute in fp32: the demo does, and few CPUs are quicker in bf16."""
    found = {"official": OFFICIAL_SETTINGS, "stock": STOCK_SETTINGS, "gdd_fast": OUR_SETTINGS}
    if device.type == "cuda":
        return found
    fp32 = {"generator_dtype": torch.float32, "discriminator_dtype": torch.float32}
    return {name: replace(settings, **fp32) for name, settings in found.items()}


def step_call(step: str, training: Training, batch: Batch) -> Callable[[], list[Tensor]]:
    """The gradients that a step computed and applied."""
    z, real, labels = batch.z, batch.real, batch.labels
    match step:
        case "G step":
            return lambda: training.generator_step(z, labels)
        case "D step":
            return lambda: training.discriminator_step(z, real, labels)
        case "R1 step":
            return lambda: training.r1_step(real, labels)
    return lambda: [*training.generator_step(z, labels), *training.discriminator_step(z, real, labels)]


def _bench(step: str, setup: Setup, compiled: bool, device: torch.device) -> Bench:
    peers = settings_for(device)
    return settings_bench(
        step, setup, {"compile": replace(peers["stock"], compiled=True)} if compiled else peers, device
    )


def settings_bench(step: str, setup: Setup, peers: dict[str, Settings], device: torch.device) -> Bench:
    """A step under several settings, each of which is compared with the public code's in float32."""
    # compared on few images: the definition in float32 takes the most memory of all
    few = replace(setup, batch=min(setup.batch, _COMPARED_IMAGES))
    reference = Training(few, replace(OFFICIAL_SETTINGS, generator_dtype=torch.float32), device)
    compared = Batch.draw(reference)
    expected = [g.clone() for g in step_call(step, reference, compared)()]
    del reference
    rules: dict[tuple[torch.dtype, torch.dtype], Gradients] = {}

    def rule(settings: Settings) -> Gradients:
        """That of the types of `settings`; plain PyTorch is run in them once."""
        types = settings.generator_dtype, settings.discriminator_dtype
        if types not in rules:
            plain = replace(_in_float32(STOCK_SETTINGS), generator_dtype=types[0], discriminator_dtype=types[1])
            rules[types] = Gradients(expected, FLOOR, step_call(step, Training(few, plain, device), compared)())
        return rules[types]

    def check(settings: Settings, outputs: list[Tensor] | None) -> None:
        if outputs is not None:
            rule(settings).check(outputs)

    def peer(name: str, settings: Settings) -> Call:
        exact = _in_float32(settings)
        rule(exact).require_values()
        rule(exact).check(step_call(step, Training(few, exact, device), compared)())
        for kind, held in (("float32", rule(exact)), ("own types", rule(settings))):
            extra[name][f"compared, {kind}"] = f"{held.in_value} of {len(held)} gradients in value"
        training = Training(setup, settings, device)
        first = [step_call(step, training, compared)]
        timed = step_call(step, training, Batch.draw(training))

        def call() -> list[Tensor] | None:
            if first:
                return first.pop()()
            timed()
            return None

        return call

    extra: dict[str, dict[str, str]] = {name: {} for name in peers}
    makers = {name: partial(peer, name, settings) for name, settings in peers.items()}
    precision = "bf16" if device.type == "cuda" else "fp32"
    checks = {name: partial(check, settings) for name, settings in peers.items()}
    return Bench(makers, lambda outputs: None, images=setup.batch, precision=precision, checks=checks, extra=extra)


def _in_float32(settings: Settings) -> Settings:
    """The same code in float32 throughout; not compiled, which takes minutes and is PyTorch's own affair."""
    wide = {"generator_dtype": torch.float32, "discriminator_dtype": torch.float32}
    return replace(settings, **wide, tf32=False, compiled=False)
