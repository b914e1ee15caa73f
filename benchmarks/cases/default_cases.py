"""What a user gets who sets nothing: an iteration of `gdd_fast.train` with a preset, in its loop's own class.

The peers are settings of that command: its defaults, eager steps, and `--precision public`; for the demo, which is for
CPUs, plain PyTorch as well. Weights and images are random, so that nothing has to be at hand; time does not depend on
them. What training computes is compared in the cases of training; here losses have to be finite.
"""

import itertools
import math
import sys
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.operator_case import package
from benchmarks.harness.timing import Call, WithParts
from benchmarks.harness.training_checks import in_types, step_parts
from benchmarks.peers import networks as peers
from benchmarks.peers.training import STOCK_SETTINGS, Batch, Setup, Training
from gdd_fast.config import RECIPES, TrainConfig, override
from gdd_fast.data.dataset import ImageDataset
from gdd_fast.device import fast_layout, gpu_arithmetic

_CAPTURED = 6
"""Steps of each kind after which none is recorded or on trial any more."""
_IN_A_ROW = 4
"""Iterations of a timed call."""


def demo_case() -> Case:
    """The bundled demo, whose recipe is for CPUs."""
    return _case(Setup("demo", 16), "demo", {})


def default_cases(full: bool) -> list[Case]:
    """At the published batch on one GPU, and at the share of one of eight; on a CPU small, with the same backbones."""
    if not full:
        small = {"disc_resolution": 32, "head_width": 0.125, "backend": "auto"}
        return [_case(Setup("cifar10-uncond-gdd-i", 4), "demo", small)]
    return [_case(Setup("cifar10-uncond-gdd-i", batch), "ncsnpp-32", {}) for batch in (256, 32)]


def _case(setup: Setup, network: str, settings: dict) -> Case:
    return Case("train", f"{setup.preset} batch {setup.batch}", partial(_bench, setup, network, settings))


def _bench(setup: Setup, network: str, settings: dict, device: torch.device) -> Bench:
    package("PIL.Image")  # of the reports that a run writes
    settings = {**settings, "device": str(device), "batch": setup.batch}
    demo = setup.preset == "demo"
    asked: dict[str, dict] = {"gdd_fast defaults": {}}
    if not demo:
        asked["gdd_fast public"] = RECIPES["public"]
    if demo or device.type == "cuda":
        asked["gdd_fast eager"] = {"engine": "eager"}
    config = override(setup.config, **settings)
    makers = {name: partial(_training, override(config, **more), network) for name, more in asked.items()}
    if demo:
        makers["stock"] = partial(_stock, setup, device)
    return Bench(makers, _check, images=setup.batch)


def _stock(setup: Setup, device: torch.device) -> Call:
    """The same steps of plain PyTorch in float32, on a batch that stays."""
    training = Training(setup, in_types(STOCK_SETTINGS), device)
    parts = step_parts("iteration", training, Batch.draw(training))

    def norms(step: Call) -> Tensor:
        return torch.stack([torch.nn.utils.get_total_norm(gradients) for gradients in step().values()])

    return WithParts([(partial(norms, step), share) for step, share in parts])


def _training(config: TrainConfig, network: str) -> Call:
    task = make_task(config, network)
    precisions = config.generator.g_precision, config.discriminator.d_precision
    rounds = itertools.count(1)

    def iterate(first: int, count: int) -> Tensor:
        """Those from `first` after one with R1 on; one may begin what the next goes on with."""
        start = next(rounds) * task.r1_interval + first
        with gpu_arithmetic(*precisions):
            for number in range(start, start + count):
                task.iteration(number * task.batch)
        if task.at_once is not None:
            task.at_once.close()  # gives other peers their cores back
        return torch.tensor(list(task.averages.take().values()))

    for _ in range(_CAPTURED):
        iterate(0, 1)
    several = max(1, min(_IN_A_ROW, task.r1_interval - 1))
    shares = (1 - 1 / task.r1_interval) / several, 1 / task.r1_interval
    return WithParts([(partial(iterate, 1, several), shares[0]), (partial(iterate, 0, 1), shares[1])])


def make_task(config: TrainConfig, network: str):
    """The task of `gdd_fast.train`'s loop, without the files that the command reads."""
    from gdd_fast.distill.components import OPERATORS, Components, build_heads, dtype_of
    from gdd_fast.distill.freeze import freeze
    from gdd_fast.distill.gdd import Distillation
    from gdd_fast.layers.backends import choose_backend
    from gdd_fast.models.discriminator import ProjectedFeatures
    from gdd_fast.ranks import World

    device, options = torch.device(config.run.device), config.discriminator

    def features(precision) -> ProjectedFeatures:
        resolution, cpu = options.disc_resolution, torch.device("cpu")
        backbones = [peers.make_backbone(name, resolution, cpu, folded=True) for name in options.backbones]
        kind = {"dtype": dtype_of(precision), "layout": fast_layout(device, precision)}
        return ProjectedFeatures(backbones, resolution, seed=config.run.seed, **kind)

    generator = peers.make_generator(network, torch.device("cpu"))
    generator.dtype = dtype_of(config.generator.g_precision)
    own = features(options.d_precision)
    r1 = own if dtype_of(config.loss.r1_precision) is own.dtype else features(config.loss.r1_precision)
    heads = build_heads(config, own, generator.label_dim, {})
    frozen = freeze(generator, config.generator.freeze)
    operators = choose_backend(config.run.backend, device.type, [generator, own, r1, heads], OPERATORS)
    images = _Noise((generator.img_channels, generator.img_resolution, generator.img_resolution))
    parts = Components(images, generator, frozen, own, r1, heads, operators, {})
    # a bar that nobody sees, and a package that a rented machine may lack
    bar = mock.MagicMock(**{"tqdm.return_value.__enter__.return_value.n": 0})
    with mock.patch.dict(sys.modules, {"tqdm": bar}):
        return Distillation(config, parts, World(0, 1, device))


class _Noise(ImageDataset):
    def __init__(self, shape: tuple[int, ...], count: int = 1024) -> None:
        super().__init__("noise", shape, None, np.arange(count))
        self._images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)

    def _read(self, index: int) -> np.ndarray:
        return self._images[index]


def _check(means: Tensor) -> None:
    if not len(means) or not math.isfinite(float(means.sum())):
        raise MismatchError("an iteration left losses that are not finite")
