"""One training iteration of GDD under given settings: those of the public code, of plain PyTorch at its best, and ours.

`Training(setup, settings, device)` has the three steps of an iteration, the last of which, R1, only every sixteenth one
has (`r1_interval` of the preset). Networks, losses and random numbers are the same whatever the settings, so that the
gradients of a step can be compared. Fields of `Settings` are the techniques that `cases/waterfall_cases.py` switches
on one after the other.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import Call
from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from gdd_fast.config import PRESETS, TrainConfig
from gdd_fast.distill.freeze import freeze
from gdd_fast.distill.losses import discriminator_loss, generator_loss, r1_penalty
from gdd_fast.layers.spectral_conv import SpectralConv2d
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.sampling.sampler import one_step
from gdd_fast.training.optimizer import AdamEma

AVERAGE_WEIGHT = 1e-3
_NETWORKS = {"cifar10": "ncsnpp-32", "ffhq": "ncsnpp-64", "afhqv2": "ncsnpp-64", "imagenet": "adm-64", "demo": "demo"}

Step = Literal["G", "D", "R1"]


@dataclass(frozen=True)
class Settings:
    """How a step is computed.

    unet: "official" | "stock" | "gdd_fast"; the first two are plain PyTorch in the two styles of stock_unet.py.
    features: the same; "official" keeps batch norms apart, "stock" folds them, "gdd_fast" is ProjectedFeatures.
    optimizer: as of `optimizer_step`.
    engine: "compile" and "max-autotune" are torch.compile's modes, for the losses of G and D; R1 differentiates twice,
        which compiled code cannot, and stays eager. "graph" is for `captured`.
    """

    channels_last: bool = False
    generator_dtype: torch.dtype = torch.bfloat16
    discriminator_dtype: torch.dtype = torch.float32
    tf32: bool = False
    unet: Literal["official", "stock", "gdd_fast"] = "official"
    features: Literal["official", "stock", "gdd_fast"] = "official"
    optimizer: Literal["loop", "fused", "adam_ema"] = "loop"
    engine: Literal["eager", "compile", "max-autotune", "graph"] = "eager"


OFFICIAL_SETTINGS = Settings()
STOCK_SETTINGS = Settings(True, torch.bfloat16, torch.bfloat16, True, "stock", "stock", "fused")
OUR_SETTINGS = replace(STOCK_SETTINGS, unet="gdd_fast", features="gdd_fast", optimizer="adam_ema")


@dataclass(frozen=True)
class Setup:
    """What is trained: a preset, with another batch if one is given."""

    preset: str
    batch: int

    @property
    def config(self) -> TrainConfig:
        return PRESETS[self.preset]

    def generator(self, device: torch.device) -> GDDPrecond:
        """The preset's network with random weights."""
        return peers.make_generator(_NETWORKS[self.preset.split("-")[0]], device)


@dataclass(frozen=True)
class Batch:
    """The inputs of an iteration: latents, real images in [-1, 1], labels or None."""

    z: Tensor
    real: Tensor
    labels: Tensor | None

    @classmethod
    def draw(cls, training: "Training") -> "Batch":
        generator = torch.Generator(training.device).manual_seed(1)
        options = {"device": training.device, "generator": generator}
        z, noise = (torch.randn(training.shape, **options) for _ in range(2))
        return cls(z, noise.clamp(-1, 1), peers.one_of_each_class(len(z), training.label_dim, training.device))


class Training:
    """The networks and optimizers of one run, and the steps; batches come from the caller.

    With `trials` cuDNN finds its fastest algorithms by trying them, as in the public code and in our runs: for what is
    timed. They take seconds for each size of batch.
    """

    def __init__(self, setup: Setup, settings: Settings, device: torch.device, *, trials: bool = False) -> None:
        self.setup, self.settings, self.device, self._trials = setup, settings, device, trials
        config = setup.config
        net = setup.generator(device)
        freeze(net, config.generator.freeze)
        self.label_dim = net.label_dim
        self.shape = (setup.batch, net.img_channels, net.img_resolution, net.img_resolution)
        if settings.unet == "gdd_fast":
            net.dtype = settings.generator_dtype
            self.generator: nn.Module = net.train()
        else:
            style = OFFICIAL if settings.unet == "official" else BEST
            self.generator = StockGenerator(net, style, settings.generator_dtype)
        self.features, self.heads = _discriminator(config, net.label_dim, settings, device)
        if settings.channels_last:
            for module in (self.generator, self.features, self.heads):
                module.to(memory_format=torch.channels_last)
        # in one order whatever the settings: plain networks share our parameters
        g_weights = [p for p in net.parameters() if p.requires_grad]
        d_weights = [p for p in self.heads.parameters() if p.requires_grad]
        self._weights: dict[str, list[nn.Parameter]] = {"G": g_weights, "D": d_weights, "R1": d_weights}
        self._averages = [w.detach().clone() for w in g_weights]
        self._fakes: Tensor | None = None
        """The images of the last G step, if the preset's D step judges them."""
        options = {"capturable": settings.engine == "graph"}
        g = optimizer_step(settings.optimizer, g_weights, self._averages, config.generator.g_lr, **options)
        d = optimizer_step(settings.optimizer, d_weights, [], config.discriminator.d_lr, **options)
        self.optimizers = (g[0], d[0])
        self._updates = {"G": g[1], "D": d[1], "R1": d[1]}
        self._losses = {
            "G": _compiled(settings, self._generator_loss),
            "D": _compiled(settings, self._discriminator_loss),
            "R1": self._r1_loss,
        }

    def step(self, name: Step, batch: Batch) -> list[Tensor]:
        """The gradients of the step's weights, which are applied: those of G that train, or those of the heads."""
        found = self.gradients(name, batch)
        with self._arithmetic():
            self._updates[name]()
        return found

    def gradients(self, name: Step, batch: Batch) -> list[Tensor]:
        """The gradients of a step, left in the weights' `grad`."""
        self._train_heads(name != "G")
        weights = self._weights[name]
        for weight in weights:
            weight.grad = None
        with self._arithmetic():
            self._losses[name](batch.z, batch.real, batch.labels).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]

    def images(self, batch: Batch) -> Tensor:
        """What the generator makes, without a graph."""
        with torch.no_grad(), self._arithmetic():
            return one_step(self.generator, batch.z, batch.labels)

    def image_gradient(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The second half of the generator step, the discriminator's: its loss differentiated by the images alone."""
        self._train_heads(False)
        leaf = images.detach().requires_grad_()
        with self._arithmetic():
            return torch.autograd.grad(self._images_loss(leaf, labels), leaf)[0]

    def weight_gradients(self, batch: Batch, image_gradient: Tensor) -> list[Tensor]:
        """The first half, the generator's: the gradients of its weights for a gradient of its images."""
        with self._arithmetic():
            fake = one_step(self.generator, batch.z, batch.labels)
            found = torch.autograd.grad(fake, self._weights["G"], image_gradient, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self._weights["G"], found, strict=True)]

    def undo(self) -> Callable[[], None]:
        """To be called before the first step: a function that puts back all that steps have changed since."""
        heads = [t for t in self.heads.buffers() if t.is_floating_point()]
        changing = [*self._weights["G"], *self._averages, *self._weights["D"], *heads]
        before = [t.detach().clone() for t in changing]

        def put_back() -> None:
            with torch.no_grad():
                torch._foreach_copy_(changing, before)
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    for tensor in state.values():
                        tensor.zero_()

        return put_back

    def captured(self, step: Call) -> Call:
        """`step`, one of this training's with fixed inputs, as a CUDA graph; its outputs are the graph's own memory.

        By PyTorch's own instructions: gradients None when the capture begins, so that they lie in the graph's memory,
        an Adam whose count is on the device (`capturable`), and inputs that stay where they are. A step changes
        weights, so what the warm-up did is undone before the capture: the first replay is the first step.
        """
        return peers.graphed(step, self.undo())

    def _generator_loss(self, z: Tensor, real: Tensor, labels: Tensor | None) -> Tensor:
        images = one_step(self.generator, z, labels)
        if self.setup.config.loss.reuse_fakes:
            self._fakes = images.detach()
        return self._images_loss(images, labels)

    def _images_loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        logits = self.heads(self.features(images), labels)
        return generator_loss(logits, self.setup.config.loss.logit_reduction, len(images))

    def _discriminator_loss(self, z: Tensor, real: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            images = one_step(self.generator, z, labels) if self._fakes is None else self._fakes
            fake_maps, real_maps = self.features(images), self.features(real)
        fake, true = self.heads(fake_maps, labels), self.heads(real_maps, labels)
        return discriminator_loss(fake, true, self.setup.config.loss.logit_reduction, len(z))

    def _r1_loss(self, z: Tensor, real: Tensor, labels: Tensor | None) -> Tensor:
        loss, images = self.setup.config.loss, real.detach().requires_grad_()
        penalty = r1_penalty(images, self.heads(self.features(images), labels))
        return penalty.sum() * (loss.r1_gamma / 2 * loss.r1_interval / len(real))

    def _arithmetic(self) -> AbstractContextManager[None]:
        return peers.tf32(self.settings.tf32, trials=self._trials)

    def _train_heads(self, train: bool) -> None:
        for weight in self._weights["D"]:
            weight.requires_grad_(train)


def _compiled(settings: Settings, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if settings.engine in ("eager", "graph"):
        return loss
    mode = None if settings.engine == "compile" else settings.engine
    compiled = torch.compile(loss, dynamic=False, mode=mode)

    def begun(*inputs: Tensor | None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune replays graphs, whose outputs it may then reuse
        return compiled(*inputs)

    return begun


def _discriminator(
    config: TrainConfig, label_dim: int, settings: Settings, device: torch.device
) -> tuple[nn.Module, DiscriminatorHeads]:
    """The frozen features and the heads, drawn from the preset's seed."""
    options, dtype = config.discriminator, settings.discriminator_dtype
    size, folded = options.disc_resolution, settings.features != "official"
    backbones = [peers.make_backbone(name, size, device, folded=folded) for name in options.backbones]
    # made in float32 first, so that all settings round the same random projection
    features: nn.Module = ProjectedFeatures(backbones, size, seed=config.run.seed).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        sizes = (features.channels, features.resolutions, label_dim)
        heads = DiscriminatorHeads(*sizes, dtype=dtype, width=options.head_width)
    if settings.features == "gdd_fast":
        features = features.to(dtype)
    else:
        for head in heads.modules():
            if isinstance(head, SpectralConv2d):
                head.divide_result = False  # PyTorch's own spectral norm
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        projections = [features.projections[b.name] for b in backbones]
        features = peers.StockFeatures(backbones, projections, size, dtype).to(device=device, memory_format=layout)
    return features, heads.to(device).train()


def optimizer_step(
    kind: Literal["loop", "fused", "adam_ema"],
    weights: Sequence[nn.Parameter],
    averages: Sequence[Tensor],
    lr: float,
    *,
    capturable: bool = False,
    backend: str = "auto",
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """An Adam, and a function that applies the gradients of `weights` and moves their averages, if there are any.

    "loop" replaces what is not finite and averages one parameter after the other, as the public code; "fused" is
    PyTorch's fused Adam between foreach operations; "adam_ema" is ours, with `backend`.
    """
    options = {"lr": lr, "betas": (0.0, 0.99), "eps": 1e-8}
    if kind == "adam_ema":
        averaged = dict(zip(weights, averages, strict=True)) if averages else None
        ours = AdamEma(weights, **options, averages=averaged, backend=backend)
        ours.average_weight.fill_(AVERAGE_WEIGHT)
        return ours, ours.step
    if kind == "fused":
        fused = torch.optim.Adam(weights, **options, fused=True, capturable=capturable)

        @torch.no_grad()
        def step_fused() -> None:
            peers.step_if_finite(fused, [w.grad for w in weights if w.grad is not None])
            if averages:
                torch._foreach_lerp_(averages, weights, AVERAGE_WEIGHT)

        return fused, step_fused
    adam = torch.optim.Adam(weights, **options, foreach=True)  # the default on a GPU

    @torch.no_grad()
    def step() -> None:
        for weight in weights:
            if weight.grad is not None:
                torch.nan_to_num(weight.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=weight.grad)
        adam.step()
        for average, weight in zip(averages, weights, strict=bool(averages)):
            average.copy_(weight.lerp(average, 1 - AVERAGE_WEIGHT))

    return adam, step
