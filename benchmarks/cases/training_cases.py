"""Cases of training: the three steps and a whole iteration of a preset, under the settings of peers/training.py.

An iteration is a G step, a D step and its share of the R1 step, which the presets take every sixteenth time.

A peer is checked on few images before it is timed, in float32 and in bf16 (training_checks.py), and its first step on
these images once more. From the second step on the weights have moved apart, and nothing is compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases.default_cases import demo_case
from benchmarks.harness.case import COMPILED, Bench, Case
from benchmarks.harness.checks import spoil
from benchmarks.harness.timing import Call, WithParts
from benchmarks.harness.training_checks import FLOAT32, Gradient, Reference, Types, in_types, step_parts
from benchmarks.peers.training import OFFICIAL_SETTINGS, OUR_SETTINGS, STOCK_SETTINGS, Batch, Settings, Setup, Training

STEPS = ("iteration", "G step", "R1 step", "D step")
_CIFAR = Setup("cifar10-uncond-gdd-i", 128)
_MORE = (Setup("cifar10-uncond-gdd-i", 256), Setup("cifar10-uncond-gdd", 128), Setup("imagenet-64-gdd-i", 64))
_COMPARED_IMAGES, _COMPARED_ON_CPU = 16, 8


def training_cases(full: bool, steps: Sequence[str] = STEPS) -> list[Case]:
    """On a CPU the demo's steps, and its iteration as a run takes it; `full` the CIFAR-10 preset's, and others'."""
    if not full:
        return [*(training_case(step, Setup("demo", 16)) for step in steps), demo_case()]
    cases = [training_case(step, _CIFAR) for step in steps]
    return [*cases, *(training_case("iteration", setup) for setup in _MORE)]


def compiled_cases() -> list[Case]:
    """torch.compile of the stock losses alone, which takes minutes to get ready."""
    return [training_case(step, _CIFAR, compiled=True) for step in ("iteration", "G step", "D step")]


def training_case(step: str, setup: Setup, *, compiled: bool = False) -> Case:
    """One step of a preset."""
    title = f"{setup.preset} batch {setup.batch}"
    return Case(step, title, partial(_bench, step, setup, compiled))


def settings_for(device: torch.device) -> dict[str, Settings]:
    """The peers. On a CPU all compute in fp32: the demo does, and few CPUs are quicker in bf16."""
    found = {"official": OFFICIAL_SETTINGS, "stock": STOCK_SETTINGS, "gdd_fast": OUR_SETTINGS}
    return found if device.type == "cuda" else {name: in_types(settings) for name, settings in found.items()}


def _bench(step: str, setup: Setup, compiled: bool, device: torch.device) -> Bench:
    peers = settings_for(device)
    if compiled:
        # compared as they are timed: for another batch they would be compiled again
        peers = {mode: replace(peers["stock"], engine=mode) for mode in COMPILED}
        return settings_bench(step, setup, peers, device, compared=setup.batch)
    if device.type == "cuda" and step != "R1 step":
        peers["graph"] = replace(peers["stock"], engine="graph")
    return settings_bench(step, setup, peers, device)


def settings_bench(
    step: str, setup: Setup, peers: dict[str, Settings], device: torch.device, *, compared: int | None = None
) -> Bench:
    """A step under several settings, each of which is compared with the public code's in float32.

    By default on few images: the definition in float32 takes the most memory of all.
    """
    gpu = device.type == "cuda"
    few = replace(setup, batch=min(setup.batch, compared or (_COMPARED_IMAGES if gpu else _COMPARED_ON_CPU)))
    # of the timed size it chooses the algorithms for what is timed
    reference = Reference(step, few, device, trials=few.batch == setup.batch)

    def check(settings: Settings, outputs: Gradient | None) -> None:
        if outputs is not None:
            reference.check_step(Types.of(settings), outputs)

    def peer(settings: Settings) -> Call:
        # what a CPU computes in float32 is checked in a GPU's types as well
        for types in (FLOAT32, Types.of(settings) if gpu else Types(torch.bfloat16, torch.bfloat16)):
            reference.check_in(types, settings)
        training = Training(setup, settings, device, trials=True)

        def prepared(batch: Batch) -> list[tuple[Call, float]]:
            (call, share), *r1 = step_parts(step, training, batch)
            return [(training.captured(call) if settings.engine == "graph" else call, share), *r1]

        return _ComparedOnce(prepared(reference.batch), prepared(Batch.draw(training)))

    makers = {name: partial(peer, settings) for name, settings in peers.items()}
    checks = {name: partial(check, settings) for name, settings in peers.items()}
    precision = "bf16" if gpu else "fp32"
    return Bench(makers, lambda outputs: None, images=setup.batch, precision=precision, checks=checks)


class _ComparedOnce(WithParts):
    """The first call runs `compared` and returns its gradients; all further ones, timed in parts, return nothing."""

    def __init__(self, compared: list[tuple[Call, float]], timed: list[tuple[Call, float]]) -> None:
        super().__init__([(partial(_quiet, call), share) for call, share in timed])
        self._compared = compared

    def __call__(self) -> Gradient | None:
        compared, self._compared = self._compared, []
        found: Gradient = {}
        for call, _ in compared:
            spoil(call)
            found |= call()
        return found or super().__call__()


def _quiet(call: Call) -> None:
    call()
