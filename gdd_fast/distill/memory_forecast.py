"""Forecasts how much GPU memory a distillation takes, before it begins and without a GPU.

The three steps of an iteration run on fake tensors, which have shapes but no values, for two batch sizes. Saved-tensor
hooks count what autograd keeps until the backward pass, every storage once: a constant plus an amount per image.
Weights, their moving average, gradients and the optimizer's moments are counted from the parameters.

Assumed, not measured: `CONTEXT` bytes for CUDA and its libraries, and `MARGIN` times what a step keeps, for its
temporaries and for gaps between allocations. Not counted: the losses of ablations, and measurements during a run. The
operators are those of this machine's CPU: with the extension they keep what a GPU's do, without it more.

diffusers networks are counted with their own layers, which keep more than the fused ones that replace them. A run whose
teacher first learns v (`first_stage`) has a forecast of that stage too; the larger of the two counts.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gdd_fast.config import AUTO, Reduction, TrainConfig, override
from gdd_fast.distill import first_stage
from gdd_fast.distill.components import Components
from gdd_fast.distill.losses import discriminator_loss, generator_loss, r1_penalty
from gdd_fast.distill.velocity import velocity_loss
from gdd_fast.errors import ConfigError
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.teachers.unet2d import UNet2DPrecond
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ranks import world_size
from gdd_fast.sampling.sampler import one_step
from gdd_fast.training.batches import split_batch

GB = 10**9
CARDS = (24, 40, 80, 141)
"""Common GPU memory sizes, in GB."""
CONTEXT = GB
MARGIN = 0.25
_LEARNING, _DISTILLING = "learning v", "distillation"  # stages
_IMAGES = 2, 4  # batch sizes to count at; other sizes lie on the line through both


@dataclass(frozen=True)
class Kept:
    """Bytes that a step keeps for its backward pass: independently of the batch, and per image."""

    constant: int
    per_image: int

    def bytes(self, images: int) -> int:
        return self.constant + images * self.per_image


@dataclass(frozen=True)
class Forecast:
    """Bytes of one GPU."""

    fixed: dict[str, int]
    """Bytes that do not depend on the batch, by what they hold."""
    steps: dict[str, Kept]
    """By step: "G", "D", "R1"; or "v" in the stage before."""
    first: "Forecast | None" = None
    """The forecast of the stage before the distillation, in a run that has one."""

    def bytes(self, images: int) -> int:
        """The peak with this many images per pass, in either stage."""
        before = self.first.bytes(images) if self.first else 0
        return max(before, self._own_bytes(images))

    def _own_bytes(self, images: int) -> int:
        largest = max(kept.bytes(images) for kept in self.steps.values())
        return sum(self.fixed.values()) + int((1 + MARGIN) * largest)

    def stage(self, images: int) -> str:
        """In a run of two stages, the name of the stage that needs `bytes`; else empty."""
        if self.first is None:
            return ""
        return _LEARNING if self.first.bytes(images) > self._own_bytes(images) else _DISTILLING

    def captured_bytes(self, images: int) -> int:
        """The peak with captured steps on trial (training/trial.py): the largest step runs eagerly once more beside the
        graphs, which share the memory of the largest."""
        largest = max(kept.bytes(images) for kept in self.steps.values())
        return sum(self.fixed.values()) + int((1 + MARGIN) * 2 * largest)

    def largest(self, memory: int, local_batch: int, *, captured: bool = False) -> int | None:
        """The most images per pass, a divisor of `local_batch`, that `memory` bytes hold; None if none fits.

        Never 1 of several, as heads norm by the batch.
        With eager steps, or with graphs of them if `captured`.
        """
        divisors = (n for n in range(local_batch, min(local_batch, 2) - 1, -1) if local_batch % n == 0)
        fitting = (n for n in divisors if self.bytes(n) <= memory)
        return next((n for n in fitting if not captured or self.captured_bytes(n) <= memory), None)

    def on_cards(self, local_batch: int, *, captured: bool = False) -> dict[int, int | None]:
        """`largest` on each of `CARDS`, by GB."""
        return {card: self.largest(card * GB, local_batch, captured=captured) for card in CARDS}

    def table(self, local_batch: int, images: int, *, captured: bool = False) -> str:
        """For `--dry-run`: the total for `images` images per pass, its parts, and how many images `CARDS` hold.

        `captured`: with graphs of the steps too.
        """
        stage = self.stage(images)
        total = f"GPU memory, forecast: {self.bytes(images) / GB:.1f} GB with {images} images at once"
        lines = [total + (f", in the stage of {stage}" if stage else "")]
        for name, found in ((_LEARNING, self.first), (_DISTILLING, self)) if self.first else (("", self),):
            lines += [f"{name.capitalize()}: {found._own_bytes(images) / GB:.1f} GB"] if name else []
            lines += found._parts(images)
        lines.append(f"Largest --batch-gpu for {local_batch} images per GPU, by GPU memory: {self._cards(local_batch)}")
        if captured:
            lines.append(f"  with steps captured as graphs: {self._cards(local_batch, captured=True)}")
        return "\n".join(lines)

    def _cards(self, local_batch: int, *, captured: bool = False) -> str:
        found = self.on_cards(local_batch, captured=captured)
        return ", ".join(f"{card} GB: {n or 'none fits'}" for card, n in found.items())

    def _parts(self, images: int) -> list[str]:
        lines = [f"  {name:<44}{size / GB:8.2f} GB" for name, size in self.fixed.items()]
        for name, kept in self.steps.items():
            label = f"kept by the {name} step for its backward pass"
            lines.append(f"  {label:<44}{kept.bytes(images) / GB:8.2f} GB, {kept.per_image / 1e6:.1f} MB per image")
        return lines


def forecast(
    config: TrainConfig,
    generator: Preconditioned,
    features: ProjectedFeatures,
    r1_features: ProjectedFeatures,
    heads: DiscriminatorHeads,
    data_bytes: int = 0,
) -> Forecast:
    """The memory of a run with these networks. Their values are not read: they may be on the meta device.

    `data_bytes` is the size of the data set as uint8, which is held on the GPU if it is at most `--data-memory-gib`.
    """
    loss = config.loss
    with FakeTensorMode(allow_non_fake_inputs=True):
        g, f, h = (without_values(net).train() for net in (generator, features, heads))
        r = f if r1_features is features else without_values(r1_features)
        g.dtype = generator.dtype
        losses = losses_of_nothing(loss.logit_reduction, g, f, r, h)
        trained = [p for p in h.parameters() if p.requires_grad]
        own = [g, f, r, h]
        steps = {"D": _kept(losses["D"], own)}
        if loss.r1_interval and loss.r1_gamma:
            steps["R1"] = _kept(losses["R1"], own)
            h.dtype = heads.dtype
        for weight in trained:
            weight.requires_grad_(False)
        steps = {"G": _kept(losses["G"], own), **steps}
    ranks = world_size() if config.run.fsdp else 1
    generators = sum(map(_size, (p for p in generator.parameters() if p.requires_grad))) // ranks
    heads_train = sum(map(_size, trained))
    trains = generators + heads_train
    frozen = {id(net): _weights(net) for net in (features, r1_features)}
    fixed = {
        "generator and its moving average": 2 * _weights(generator) // ranks,
        **({"its blocks that --fsdp gathers": _gathered(generator)} if ranks > 1 else {}),
        "backbones, projections and heads": sum(frozen.values()) + _weights(heads),
        "gradients": trains,
        **_exchanged((generators if ranks == 1 else 0) + 2 * heads_train),  # D's and R1's
        "optimizers": 2 * trains,
        **_beside(config, data_bytes),
    }
    return Forecast(fixed, steps)


def of_first_stage(config: TrainConfig, generator: UNet2DPrecond, data_bytes: int = 0) -> Forecast:
    """As `forecast`, for the stage in which a network of `generator`'s architecture learns to predict v."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = without_values(generator).train().requires_grad_(True)

        def step(images: int) -> Tensor:
            real = torch.empty(images, net.img_channels, net.img_resolution, net.img_resolution)
            labels = torch.empty(images, net.label_dim) if net.label_dim else None
            return velocity_loss(net, real, labels, torch.Generator()).sum()

        steps = {"v": _kept(step, [net])}
    weights = _weights(generator)
    trains = sum(map(_size, generator.parameters()))
    fixed = {
        "network and its moving average": 2 * weights,
        "gradients": trains,
        **_exchanged(trains),
        "optimizer": 2 * trains,
        **_beside(config, data_bytes),
    }
    return Forecast(fixed, steps)


def _exchanged(size: int) -> dict[str, int]:
    """The buffers for exchanging gradients between ranks, one per kind of step, even if the run lacks that step."""
    return {"gradients that processes exchange": size} if world_size() > 1 else {}


def _beside(config: TrainConfig, data_bytes: int) -> dict[str, int]:
    """What a GPU holds besides networks."""
    held = data_bytes if data_bytes <= config.data.data_memory_gib * 2**30 else 0
    return {"data set": held, "CUDA and its libraries, assumed": CONTEXT}


def losses_of_nothing(
    reduction: Reduction, g: Preconditioned, f: Any, r: Any, h: DiscriminatorHeads
) -> dict[str, Callable[[int], Tensor]]:
    """The losses of steps G, D and R1 by number of images without values. R1 leaves the heads in the dtype of `r`."""

    def inputs(images: int) -> tuple[Tensor, Tensor | None]:
        shape = images, g.img_channels, g.img_resolution, g.img_resolution
        return torch.empty(shape), torch.empty(images, g.label_dim) if g.label_dim else None

    def generator_step(images: int) -> Tensor:
        z, labels = inputs(images)
        return generator_loss(h(f(one_step(g, z, labels)), labels), reduction, images)

    def discriminator_step(images: int) -> Tensor:
        z, labels = inputs(images)
        with torch.no_grad():
            fake, real = f(one_step(g, z, labels)), f(z)
        return discriminator_loss(h(fake, labels), h(real, labels), reduction, images)

    def r1_step(images: int) -> Tensor:
        z, labels = inputs(images)
        h.dtype = r.dtype
        return r1_penalty(z.requires_grad_(), h(r(z), labels)).sum()

    return {"G": generator_step, "D": discriminator_step, "R1": r1_step}


def of_components(config: TrainConfig, parts: Components) -> Forecast:
    """The forecast of a run whose parts are built, including that of its first stage, if any."""
    data, generator = parts.dataset, parts.generator
    data_bytes = len(data) * data.channels * data.resolution**2
    found = forecast(config, generator, parts.features, parts.r1_features, parts.heads, data_bytes)
    if isinstance(generator, UNet2DPrecond) and first_stage.is_wanted(config, generator):
        return replace(found, first=of_first_stage(config, generator, data_bytes))
    return found


def settle(config: TrainConfig, parts: Components, device: torch.device, world_size: int) -> TrainConfig:
    """`config` with `--batch-gpu auto` replaced by a number; and, on a GPU whose memory would not hold captured steps,
    `--engine auto` by eager.

    Where both are auto, the batch is one that graphs have room for if that is at least half of what fits without: they
    need about twice the memory, and half a batch costs less than a GPU that waits for the host. Raises ConfigError as
    `automatic`.
    """
    run = config.run
    local_batch, images = split_batch(run.batch, run.batch_gpu, world_size)
    if device.type != "cuda":
        return override(config, batch_gpu=images) if run.batch_gpu == AUTO else config
    capture = run.engine == "auto" and config.has_fixed_steps
    if run.batch_gpu != AUTO and not capture:
        return config
    found = of_components(config, parts)
    if run.batch_gpu == AUTO:
        images = automatic(found, device, local_batch, captured=run.engine == "graph")
        if capture:
            fewer = found.largest(memory_of(device), local_batch, captured=True)
            images = fewer if fewer and 2 * fewer >= images else images
        config = override(config, batch_gpu=images)
    if capture and found.captured_bytes(images) > memory_of(device):
        print(f"Steps run eagerly: with captured ones {images} images at once may not fit on {device}", file=sys.stderr)
        config = override(config, engine="eager")
    return config


def memory_of(device: torch.device) -> int:
    """Bytes of the whole GPU: the free part may differ between processes, which have to agree."""
    return torch.cuda.get_device_properties(device).total_memory


def automatic(found: Forecast, device: torch.device, local_batch: int, *, captured: bool = False) -> int:
    """As many images at once as the GPU's memory holds, as `Forecast.largest`.

    Raises ConfigError if by the forecast not even two fit.
    """
    memory = memory_of(device)
    images = found.largest(memory, local_batch, captured=captured)
    if images is None:
        if captured and found.largest(memory, local_batch) is not None:
            raise ConfigError(
                f"--batch-gpu auto: {device} has {memory / GB:.1f} GB, and two images at once need about "
                f"{found.captured_bytes(2) / GB:.1f} with captured steps: use --engine auto"
            )
        stage = found.stage(2)
        ways = "--g-precision bf16" if stage == _LEARNING else "--d-precision bf16, fewer --backbones,"
        raise ConfigError(
            f"--batch-gpu auto: two images at once need about {found.bytes(2) / GB:.1f} GB"
            f"{f' in the stage of {stage}' if stage else ''} and {device} has {memory / GB:.1f}: use {ways} or give "
            "--batch-gpu a number to try it"
        )
    return images


def _gathered(generator: nn.Module) -> int:
    """The peak: one block, the next one, and the gradients of a third."""
    return 3 * max((_weights(module) for module in generator.modules() if isinstance(module, UNetBlock)), default=0)


def saved_bytes(run: Callable[[], object], own: set[int]) -> int:
    """Bytes of the distinct storages that `run()` keeps for backward, except those in `own` (see `own_storages`)."""
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no address is reused while counting
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = run()
    del outputs
    return sum(kept.values())


def own_storages(*nets: nn.Module) -> set[int]:
    """The storages of parameters and buffers."""
    return {t.untyped_storage()._cdata for net in nets for t in _tensors(net)}


def _kept(step: Callable[[int], Tensor], nets: list[nn.Module]) -> Kept:
    own = own_storages(*nets)
    few, more = (saved_bytes(partial(step, images), own) for images in _IMAGES)
    per_image = (more - few) // (_IMAGES[1] - _IMAGES[0])
    return Kept(few - _IMAGES[0] * per_image, per_image)


def without_values(net: Any) -> Any:
    """A copy of `net` with fake tensors on the CPU; call it within a FakeTensorMode."""

    def fake(t: Tensor) -> Tensor:
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    return copy.deepcopy(net, {id(t): fake(t) for t in _tensors(net)})


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    return chain(net.parameters(), net.buffers())


def _size(t: Tensor) -> int:
    return t.numel() * t.itemsize


def _weights(net: nn.Module) -> int:
    return sum(map(_size, _tensors(net)))
