"""Distillation with a GAN loss alone (GDD / GDD-I): what one iteration does.

Zheng & Yang, "Diffusion Models Are Innate One-Step Generators" (arXiv 2405.20750). The teacher only provides initial
weights: it is not in the loop. An iteration is a generator step, a discriminator step, and sometimes an R1 step.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.acceleration import accelerate_foreign
from gdd_fast.config import TrainConfig
from gdd_fast.data import BatchStream
from gdd_fast.device import fast_layout
from gdd_fast.distill.additional_losses import AdditionalLosses, build_additional
from gdd_fast.distill.adversary import Adversary, Features, logged
from gdd_fast.distill.components import Components
from gdd_fast.distill.measuring import Evaluation
from gdd_fast.distill.step_engine import step_engine
from gdd_fast.distill.steps_at_once import Place, StepsAtOnce
from gdd_fast.models.discriminator import ProjectedFeatures
from gdd_fast.models.files.load import RUN_GENERATOR, holds_network
from gdd_fast.models.files.save import save_network
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.ranks import World
from gdd_fast.report import report_page
from gdd_fast.sampling.grid import save_grid
from gdd_fast.sampling.sampler import one_step
from gdd_fast.sampling.seeds import latents
from gdd_fast.training.batches import chunks, split_batch
from gdd_fast.training.captured_steps import CapturedSteps, CudaGraphs, Step
from gdd_fast.training.checkpoint import Checkpoint, Sections, optimizer_tensors, optimizer_values
from gdd_fast.training.compiled_losses import compiled, compiling
from gdd_fast.training.ema import Ema
from gdd_fast.training.finite import FiniteWatch
from gdd_fast.training.optimizer import StepGuard, make_adam
from gdd_fast.training.output import Averages, reading_bar
from gdd_fast.training.random_state import RandomState
from gdd_fast.training.rates import RateDecay
from gdd_fast.training.sharding import assembled, form_of, gathered, shard
from gdd_fast.training.trial import Trial

GRID_SEEDS = range(64)


class Distillation:
    """The task of `loop.run` that turns a teacher into a one-step generator."""

    remedy = "a lower --g-lr and --d-lr, or with --g-precision fp32 --d-precision fp32,"

    def __init__(
        self, config: TrainConfig, parts: Components, world: World, evaluation: Evaluation | None = None
    ) -> None:
        run, device = config.run, world.device
        self.config, self.world, self.batch = config, world, run.batch
        self.evaluation = evaluation
        self.local_batch, self.micro_batch = split_batch(run.batch, run.batch_gpu, world.size)
        precisions = config.generator.g_precision, config.discriminator.d_precision
        self.layout, heads_layout = (fast_layout(device, precision) for precision in precisions)
        self.generator = parts.generator.train()
        if not run.fsdp:
            self.generator.to(device, memory_format=self.layout)  # type: ignore[call-overload]
        accelerate_foreign(self.generator, run.backend)
        self.features, self.r1_features = parts.features.to(device), parts.r1_features.to(device)
        self.heads = parts.heads.to(device, memory_format=heads_layout).train()  # type: ignore[call-overload]
        self.ema = Ema(self.generator, config.generator.ema_halflife_mimg * 1e6, config.generator.ema_rampup)
        # used for sampling and export: published distances are for float32
        self.ema.net.dtype = torch.float32  # type: ignore[assignment]
        self._form: Preconditioned | None = None
        """A copy of `ema.net`'s form from before sharding; None if it is not sharded."""
        if run.fsdp:
            averaged: Any = self.ema.net
            self._form = form_of(averaged)
            shard(self.generator, world)
            shard(averaged, world)
        self.adversary = Adversary(self.features, self.r1_features, self.heads, config.loss, self.local_batch)
        self.r1_interval = config.loss.r1_interval if config.loss.r1_gamma else 0
        self.operators, self.contents = parts.operators, parts.contents
        backend = parts.operators["adam_ema"]
        self.additional = build_additional(config, parts, self.generator, world)
        averages, weights = self.ema.averages, list(self.generator.parameters())
        if self.additional is not None:
            weights += self.additional.parameters()
            averages = averages | self.additional.averages
        g_optimizer = make_adam(weights, config.generator.g_lr, averages=averages, backend=backend)
        d_optimizer = make_adam(self.heads.parameters(), config.discriminator.d_lr, self.r1_interval, backend=backend)
        self.rates = RateDecay(g_optimizer, d_optimizer, reference=run.lr_decay_kimg * 1e3)
        limits = run.max_skipped_steps, run.nonfinite
        self.g_guard = StepGuard("generator", g_optimizer, world, *limits)
        self.d_guard = StepGuard("discriminator", d_optimizer, world, *limits)
        self.r1_guard = StepGuard("R1", d_optimizer, world, *limits)
        self.gan = config.ablation.gan == "on"
        self.judges_fakes = self.gan or bool(config.ablation.frechet_loss)
        self.random = RandomState(run.seed, world)
        self._fakes: Tensor | None = None
        """The images of the last G step, if `reuse_fakes`."""
        if config.loss.reuse_fakes and self.judges_fakes:
            self._fakes = torch.zeros(self._shape(self.local_batch), device=device)
        engine = step_engine(config, device, world.size)
        self.steps = CapturedSteps(
            CudaGraphs(device, self.random.generator) if engine == "graph" else None,
            Trial(self.changing, self.random) if run.engine == "auto" else None,
        )
        self._applied = {kind: partial(self._apply, kind) for kind in self._guards()}
        self.loss_g, self.loss_d = self._loss_g, self._loss_d
        if engine == "compile":
            self.loss_g, self.loss_d = compiled(self._loss_g), compiled(self._loss_d)
            if world.is_main and self.r1_interval:
                said = "G and D steps are compiled; R1 steps run eagerly, as second derivatives do not compile"
                print(said, file=sys.stderr)
        self.watch = FiniteWatch(self._networks()) if run.debug_finite else None
        self._images = 0
        self.averages = Averages()
        with reading_bar(world.is_main) as progress:
            self.stream = BatchStream(
                parts.dataset,
                self.local_batch,
                seed=run.seed,
                rank=world.rank,
                world_size=world.size,
                x_flip=config.data.x_flip,
                device=device,
                workers=config.data.workers,
                memory_limit=int(config.data.data_memory_gib * 2**30),
                progress=progress,
            )
        self.at_once: StepsAtOnce | None = None
        if engine == "threads":
            guards = self.g_guard, self.d_guard
            draws = self._place, self._read, self._draw
            self.at_once = StepsAtOnce(self.adversary, guards, *draws, self._make)

    def iteration(self, images: int) -> None:
        """One G step, one D step, and a separate R1 step every `r1_interval` iterations."""
        self._images = images
        if self.at_once is None:
            real, labels = self._read()
        else:
            drawn = self.at_once.next()
            real, labels = drawn.real, drawn.labels
        self.rates.set(images)
        self.g_guard.optimizer.average_weight.fill_(1 - self.ema.decay(images, self.batch))
        number = images // self.batch
        if self.at_once is not None:
            self._log(self.at_once.take())
        elif self.additional is None:
            self.generator_step(labels)
        else:
            self.additional.begin(self.generator, images, number)
            self.generator_step(labels, real)
            self._log(self.additional.end(self.generator))
        if not self.gan:
            return
        if self.at_once is None:
            self.discriminator_step(real, labels)
        if self.r1_interval and number and number % self.r1_interval == 0:
            self.r1_step(real, labels)

    def generator_step(self, labels: Tensor | None, *real: Tensor) -> None:
        """Minimise softplus(-D(G(z))), through the frozen backbones, over G's trainable weights; average these.

        `real` images are for losses that an ablation adds.
        """
        self._take("g", self._generator_step, labels, *real)

    def discriminator_step(self, real: Tensor, labels: Tensor | None) -> None:
        """Minimise softplus(D(G(z))) + softplus(-D(x)) over the heads; the frozen features need no graph."""
        self._take("d", self._discriminator_step, real, labels)

    def r1_step(self, real: Tensor, labels: Tensor | None) -> None:
        """Minimise gamma / 2 ||d D / d x||^2, times the interval between such steps (lazy regularisation)."""
        self._take("r1", self._r1_step, real, labels)

    def _take(self, kind: str, step: Step, *inputs: Tensor | None) -> None:
        """Take one step, eager or captured: all that changes between calls is in tensors, or done here. With several
        processes it is two captures, with their exchange between these.
        """
        guard = self._guards()[kind]
        guard.begin()
        watch = self.watch and self.watch.step(guard.name, self._images, guard.optimizer)
        with watch or contextlib.nullcontext(), compiling(guard.name):
            self._log(self.steps(guard.name, step, *inputs))
            if self.world.size > 1:
                guard.exchange()
                self._log(self.steps(f"{guard.name}, exchanged", self._applied[kind]))
        guard.end()

    def _ended(self, kind: str) -> dict[str, Tensor]:
        """End a step: apply its gradients or, with several processes, pack them for the exchange."""
        if self.world.size == 1:
            return self._apply(kind)
        self._guards()[kind].pack()
        return {}

    def _apply(self, kind: str) -> dict[str, Tensor]:
        return {f"grad_norm_{kind}": self._guards()[kind].apply()}

    def _log(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.averages.add(name, value)

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """The next real images, in [-1, 1], and their labels."""
        real, labels = next(self.stream)
        return real.float() / 127.5 - 1, labels

    def _make(self, z: Tensor, label: Tensor | None) -> Features:
        """The features that the discriminator sees of the generator's images."""
        return self.features(one_step(self.generator, z, label))

    def _generator_step(self, labels: Tensor | None, *real: Tensor) -> dict[str, Tensor]:
        self.adversary.train_heads(False)
        total = torch.zeros((), device=self.world.device)
        parts = [images.split(self.micro_batch) for images in real]
        fakes: Tensor | None
        for i, label in enumerate(chunks(labels, self.micro_batch, self.local_batch)):
            if self.additional is None:
                loss, fakes = self.loss_g(self._draw(), label)
            else:
                loss, fakes = self._loss_with(self.additional, parts[0][i], label)
            loss.backward()
            if self._fakes is not None and fakes is not None:
                self._fakes[i * self.micro_batch :][: self.micro_batch].copy_(fakes)
            total += loss.detach()
        return {"loss_g": total, **self._ended("g")}

    def _loss_g(self, z: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """G's GAN loss for a micro-batch, and the images it was computed on."""
        fakes = one_step(self.generator, z, label)
        return self.adversary.fooled(self.features(fakes), label), fakes.detach()

    def _loss_with(
        self, additional: AdditionalLosses, real: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of the GAN loss, if any, and those that an ablation adds; and the images, if any are judged."""
        fakes = one_step(self.generator, self._draw(), label) if self.judges_fakes else None
        losses = [self.adversary.fooled(self.features(fakes), label)] if self.gan and fakes is not None else []
        more = additional(self.generator, fakes, real, label, self.random.generator)
        # reduced over images as the GAN loss is
        losses.append(more.sum() if self.config.loss.logit_reduction == "rows" else more.sum() / self.local_batch)
        return torch.stack(losses).sum(), None if fakes is None else fakes.detach()

    def _discriminator_step(self, real: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        self.adversary.train_heads(True)
        total = torch.zeros((), device=self.world.device)
        seen: list[Tensor] = []
        made = None if self._fakes is None else self._fakes.split(self.micro_batch)
        for i, (part, label) in enumerate(self._micro_batches(real, labels)):
            loss, logits = self.loss_d(self._draw() if made is None else made[i], part, label)
            loss.backward()
            total += loss.detach()
            seen.append(logits)
        return {"loss_d": total, **logged(torch.stack(seen).mean(0)), **self._ended("d")}

    def _loss_d(self, source: Tensor, real: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Adversary.told_apart` for a micro-batch; `source` holds the latents to make fakes from, or the fakes."""
        with torch.no_grad():
            fakes = one_step(self.generator, source, label) if self._fakes is None else source
            fake_features = self.features(fakes)
        return self.adversary.told_apart(fake_features, self.adversary.seen(real), label)

    def _r1_step(self, real: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        self.adversary.train_heads(True)
        penalties: list[Tensor] = []
        with self.adversary.r1_arithmetic():
            for part, label in self._micro_batches(real, labels):
                loss, penalty = self.adversary.gradient_penalty(part, label)
                loss.backward()
                penalties.append(penalty)
        return {"r1_penalty": torch.stack(penalties).mean(), **self._ended("r1")}

    def changing(self) -> Iterator[Tensor]:
        """Every tensor that steps change: weights, buffers, averages, moments, counts, images kept for the next."""
        if self._fakes is not None:
            yield self._fakes
        for net in (self.generator, self.ema.net, self.heads):
            yield from net.parameters()
            yield from net.buffers()
        for guard in self._guards().values():
            yield from guard.changing()

    def _draw(self) -> Tensor:
        """The latents of the next micro-batch."""
        z = torch.randn(self._shape(self.micro_batch), device=self.world.device, generator=self.random.generator)
        # maps take their layout from the weights, but sharded weights have lost theirs
        return z if self._form is None else z.contiguous(memory_format=self.layout)

    def _shape(self, images: int) -> tuple[int, int, int, int]:
        net = self.generator
        return images, net.img_channels, net.img_resolution, net.img_resolution

    def _micro_batches(self, images: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        size, total = self.micro_batch, len(images)
        return zip(images.split(size), chunks(labels, size, total), strict=True)

    def tick(self, images: int) -> dict[str, float]:
        """Write a sample grid of the averaged generator, as `gdd_fast.sample` does; its metrics, and skipped steps."""
        with self._all_threads():
            self.save_sheet(images)
            skipped = {f"skipped_{name}": float(guard.skipped) for name, guard in self._guards().items()}
            if self.evaluation is None or not self.evaluation.is_due(images):
                return skipped
            return {**skipped, **self.evaluation(self.averaged(), images)}

    def _all_threads(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.at_once is None else self.at_once.two.together()

    def averaged(self) -> Preconditioned:
        """The whole averaged generator: itself, or a copy assembled from its shards. Every rank calls it."""
        net: Any = self.ema.net
        return net if self._form is None else assembled(self._form, net)

    def save_sheet(self, images: int) -> None:
        """Write the averaged generator's images of `GRID_SEEDS` to a file named by the number of images seen.

        The main rank makes them; every rank calls it.
        """
        net = self.averaged()
        if not self.world.is_main:
            return
        path = self.config.run_dir / "samples" / f"{images:09d}.png"
        z, labels = latents(GRID_SEEDS, self._shape(1)[1:], self.generator.label_dim, self.world.device)
        with torch.no_grad():
            samples = torch.cat([one_step(net, *part) for part in self._micro_batches(z, labels)])
        save_grid(to_uint8(samples), path)

    def _networks(self) -> dict[str, nn.Module]:
        found = {"generator": self.generator, "features": self.features, "heads": self.heads}
        return found if self.r1_features is self.features else {**found, "r1_features": self.r1_features}

    def _all_features(self) -> tuple[ProjectedFeatures, ProjectedFeatures]:
        return self.features, self.r1_features

    def _guards(self) -> dict[str, StepGuard]:
        return {"g": self.g_guard, "d": self.d_guard, "r1": self.r1_guard}

    def state(self) -> tuple[Sections, dict[str, Any]]:
        random, stream = self._place() if self.at_once is None else self.at_once.place()
        sections = {
            "generator": self.generator.state_dict(),
            "ema": self.ema.net.state_dict(),
            "heads": self.heads.state_dict(),
            # unrounded, if one of the two has rounded it
            "projection": max(self._all_features(), key=lambda f: f.dtype.itemsize).projection_state(),
            "g_optimizer": optimizer_tensors(self.g_guard.optimizer),
            "d_optimizer": optimizer_tensors(self.d_guard.optimizer),
            "random": self.random.tensors(random),
        }
        if self.additional is not None:
            sections |= self.additional.state()
        values = {
            "g_optimizer": optimizer_values(self.g_guard.optimizer),
            "d_optimizer": optimizer_values(self.d_guard.optimizer),
            "stream": stream,
            "skipped": {name: guard.skipped for name, guard in self._guards().items()},
        }
        return {name: gathered(tensors, self.world) for name, tensors in sections.items()}, values

    def _place(self) -> Place:
        return self.random.generator.get_state(), self.stream.state_dict()

    def restore(self, saved: Checkpoint) -> None:
        if self.at_once is not None:
            self.at_once.forget()
        self.steps.reset()  # loading an optimizer replaces the tensors that recordings change
        saved.load_module("generator", self.generator)
        saved.load_module("ema", self.ema.net)
        saved.load_module("heads", self.heads)
        for features in self._all_features():
            features.load_projection_state(saved.section("projection"))
        saved.load_optimizer("g_optimizer", self.g_guard.optimizer)
        saved.load_optimizer("d_optimizer", self.d_guard.optimizer)
        self.random.restore(saved.section("random"), saved.values["images"])
        self.stream.load_state_dict(saved.values["stream"])
        if self.additional is not None:
            self.additional.restore(saved, self.generator)
        for name, guard in self._guards().items():
            guard.restore(saved.values["skipped"][name])

    def export(self, run_dir: Path, sections: Sections) -> None:
        net: Any = self._form or self.ema.net
        # the network last, as `exported` checks it: after a kill in between, the page is written again too
        report_page.refresh(run_dir)
        save_network(net, run_dir / RUN_GENERATOR, weights=sections["ema"])

    def exported(self, run_dir: Path) -> bool:
        net = self.averaged()
        return self.world.is_main and report_page.is_there(run_dir) and holds_network(net, run_dir / RUN_GENERATOR)

    def close(self) -> None:
        self.stream.close()
        if self.at_once is not None:
            self.at_once.close()
