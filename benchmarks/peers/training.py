"""One training iteration of GDD under given settings: those of the public code, of plain PyTorch at its best, and ours.

`Training(setup, settings, device)` has the three steps of an iteration, the last of which, R1, only every sixteenth one
has (`r1_interval` of the preset). Networks, losses and random numbers are the same whatever the settings, so that the
gradients of a step can be compared. Fields of `Settings` are the techniques that the waterfall of roofline.py switches
on one after the other.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from gdd_fast.config import DEMO, PRESETS, TrainConfig
from gdd_fast.distill.freeze import freeze
from gdd_fast.distill.losses import Logits, discriminator_loss, generator_loss, r1_penalty
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.sampling.sampler import one_step
from gdd_fast.training.optimizer import AdamEma

AVERAGE_WEIGHT = 1e-3
_NETWORKS = {"cifar10": "ncsnpp-32", "ffhq": "ncsnpp-64", "afhqv2": "ncsnpp-64", "imagenet": "adm-64"}


@dataclass(frozen=True)
class Settings:
    """How a step is computed.

    unet: "official" | "stock" | "gdd_fast"; the first two are plain PyTorch in the two styles of stock_unet.py.
    features: the same; "official" keeps batch norms apart, "stock" folds them, "gdd_fast" is ProjectedFeatures.
    optimizer: "loop" replaces what is not finite, steps and averages one parameter after the other; "fused" is
        PyTorch's fused Adam between foreach operations; "adam_ema" is ours.
    engine: "compile" and "max-autotune" are torch.compile's modes, for the losses of G and D; R1 differentiates twice,
        which compiled code cannot, and stays eager. "graph" is for training_engines.py to capture.
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
        """The preset's network with random weights; of the demo's, the bundled teacher's architecture."""
        if self.preset.startswith(DEMO):
            from gdd_fast.bundled import BUNDLED_TEACHER

            init = json.loads((BUNDLED_TEACHER / "config.json").read_text())["init"]  # weights would need safetensors
            init |= {"dtype": "float32", "augment_dim": 0, "dropout": 0.0, "label_dropout": 0.0}
            del init["sigma_eps"]
            return peers.randomized(lambda: GDDPrecond(**init), device)
        return peers.make_generator(_NETWORKS[self.preset.split("-")[0]], device)


class Training:
    """The networks and optimizers of one run, and the steps; `z`, `real` and `labels` come from the caller.

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
        self.features = _features(config, settings, device)
        self.heads = _heads(config, net.label_dim, settings, device)
        if settings.channels_last:
            for module in (self.generator, self.features, self.heads):
                module.to(memory_format=torch.channels_last)
        # in one order whatever the settings: plain networks share our parameters
        self._g_weights = [p for p in net.parameters() if p.requires_grad]
        self._d_weights = [p for p in self.heads.parameters() if p.requires_grad]
        self._averages = [w.detach().clone() for w in self._g_weights]
        rates = config.generator.g_lr, config.discriminator.d_lr
        self._g_adam, self._g_update = _update(settings, self._g_weights, rates[0], self._averages)
        self._d_adam, self._d_update = _update(settings, self._d_weights, rates[1], [])
        self._g_loss, self._d_loss = (
            _engine(settings, self._generator_loss),
            _engine(settings, self._discriminator_loss),
        )

    def generator_step(self, z: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The gradients of the weights of G that train, which are applied."""
        self._train_heads(False)
        _clear(self._g_weights)
        with self._arithmetic():
            self._g_loss(z, labels).backward()
            return self._apply(self._g_weights, self._g_update)

    def discriminator_step(self, z: Tensor, real: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The gradients of the heads, which are applied."""
        self._train_heads(True)
        _clear(self._d_weights)
        with self._arithmetic():
            self._d_loss(z, real, labels).backward()
            return self._apply(self._d_weights, self._d_update)

    def r1_step(self, real: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The gradients of the R1 penalty, which are applied."""
        loss = self.setup.config.loss
        self._train_heads(True)
        _clear(self._d_weights)
        images = real.detach().requires_grad_()
        with self._arithmetic():
            logits: Logits = self.heads(self.features(images), labels)
            penalty = r1_penalty(images, logits).sum() * (loss.r1_gamma / 2 * loss.r1_interval / len(real))
            penalty.backward()
            return self._apply(self._d_weights, self._d_update)

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """What the generator makes, without a graph."""
        with torch.no_grad(), self._arithmetic():
            return one_step(self.generator, z, labels)

    def image_gradient(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The second half of the generator step, the discriminator's: its loss differentiated by the images alone."""
        self._train_heads(False)
        leaf = images.detach().requires_grad_()
        with self._arithmetic():
            return torch.autograd.grad(self._images_loss(leaf, labels), leaf)[0]

    def weight_gradients(self, z: Tensor, labels: Tensor | None, image_gradient: Tensor) -> list[Tensor]:
        """The first half, the generator's: the gradients of its weights for a gradient of its images."""
        with self._arithmetic():
            fake = one_step(self.generator, z, labels)
            found = torch.autograd.grad(fake, self._g_weights, image_gradient, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self._g_weights, found, strict=True)]

    def undo(self) -> Callable[[], None]:
        """To be called before the first step: a function that puts back all that steps have changed since."""
        heads = [t for t in self.heads.buffers() if t.is_floating_point()]
        changing = [*self._g_weights, *self._averages, *self._d_weights, *heads]
        before = [t.detach().clone() for t in changing]

        def put_back() -> None:
            with torch.no_grad():
                torch._foreach_copy_(changing, before)
            for adam in (self._g_adam, self._d_adam):
                for state in adam.state.values():
                    for tensor in state.values():
                        tensor.zero_()

        return put_back

    def _generator_loss(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return self._images_loss(one_step(self.generator, z, labels), labels)

    def _images_loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        logits = self.heads(self.features(images), labels)
        return generator_loss(logits, self.setup.config.loss.logit_reduction, len(images))

    def _discriminator_loss(self, z: Tensor, real: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            fake_maps, real_maps = self.features(one_step(self.generator, z, labels)), self.features(real)
        fake, true = self.heads(fake_maps, labels), self.heads(real_maps, labels)
        return discriminator_loss(fake, true, self.setup.config.loss.logit_reduction, len(z))

    def _arithmetic(self) -> AbstractContextManager[None]:
        return peers.tf32(self.settings.tf32, trials=self._trials)

    def _train_heads(self, train: bool) -> None:
        for weight in self._d_weights:
            weight.requires_grad_(train)

    @staticmethod
    def _apply(weights: list[Tensor], update: Callable[[], None]) -> list[Tensor]:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        update()
        return gradients


def _engine(settings: Settings, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if settings.engine in ("eager", "graph"):
        return loss
    mode = None if settings.engine == "compile" else settings.engine
    compiled = torch.compile(loss, dynamic=False, mode=mode)

    def begun(*inputs: Tensor | None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune replays graphs, whose outputs it may then reuse
        return compiled(*inputs)

    return begun


def _clear(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        weight.grad = None


def _features(config: TrainConfig, settings: Settings, device: torch.device) -> nn.Module:
    options = config.discriminator
    backbones = [
        peers.make_backbone(name, options.disc_resolution, device, folded=settings.features != "official")
        for name in options.backbones
    ]
    # made in float32 first, so that all settings round the same random projection
    ours = ProjectedFeatures(backbones, options.disc_resolution, seed=config.run.seed).to(device)
    dtype = settings.discriminator_dtype
    if settings.features == "gdd_fast":
        return ours.to(dtype)
    projections = [ours.projections[b.name] for b in backbones]
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    stock = peers.StockFeatures(backbones, projections, options.disc_resolution, dtype)
    return stock.to(device=device, memory_format=layout)


def _heads(config: TrainConfig, label_dim: int, settings: Settings, device: torch.device) -> DiscriminatorHeads:
    options = config.discriminator
    with torch.device("meta"):
        backbones = [peers.build_backbone(name, None, options.disc_resolution) for name in options.backbones]
        like = ProjectedFeatures(backbones, options.disc_resolution)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        sizes = (like.channels, like.resolutions, label_dim)
        heads = DiscriminatorHeads(*sizes, dtype=settings.discriminator_dtype, width=options.head_width)
    return heads.to(device).train()


def _update(
    settings: Settings, weights: list[Tensor], lr: float, averages: list[Tensor]
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """An optimizer, and a function that applies the gradients of `weights` and moves their averages, if there are."""
    options = {"lr": lr, "betas": (0.0, 0.99), "eps": 1e-8}
    if settings.optimizer == "adam_ema":
        adam = AdamEma(weights, **options, averages=dict(zip(weights, averages, strict=True)) if averages else None)
        adam.average_weight.fill_(AVERAGE_WEIGHT)
        return adam, adam.step
    if settings.optimizer == "fused":
        adam = torch.optim.Adam(weights, **options, fused=True, capturable=settings.engine == "graph")

        @torch.no_grad()
        def fused() -> None:
            gradients = [w.grad for w in weights if w.grad is not None]
            peers.step_if_finite(adam, gradients)
            if averages:
                torch._foreach_lerp_(averages, weights, AVERAGE_WEIGHT)

        return adam, fused
    adam = torch.optim.Adam(weights, **options, foreach=False)

    @torch.no_grad()
    def loop() -> None:
        for weight in weights:
            if weight.grad is not None:
                torch.nan_to_num(weight.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=weight.grad)
        adam.step()
        for average, weight in zip(averages, weights, strict=bool(averages)):
            average.copy_(weight.lerp(average, 1 - AVERAGE_WEIGHT))

    return adam, loop
