"""Distillation by an exclusive GAN loss (GDD / GDD-I): what one iteration does.

Zheng & Yang, "Diffusion Models Are Innate One-Step Generators" (arXiv 2405.20750). The teacher gives its weights and
nothing else: it is not in the loop. An iteration is a generator step, a discriminator step, and now and then an R1 step.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdd_fast.config import TrainConfig
from gdd_fast.data import BatchStream
from gdd_fast.distill.checkpoint import Checkpoint, optimizer_tensors, optimizer_values
from gdd_fast.distill.distributed import World
from gdd_fast.distill.ema import Ema
from gdd_fast.distill.losses import Logits, discriminator_loss, generator_loss, mean_logit, r1_penalty
from gdd_fast.distill.optim import StepGuard, make_adam
from gdd_fast.distill.output import Averages
from gdd_fast.distill.parts import Parts
from gdd_fast.distill.pretraining import split_batch
from gdd_fast.distill.random_state import RandomState
from gdd_fast.inference.grid import save_grid
from gdd_fast.inference.sampler import one_step
from gdd_fast.models.load import save_network

GRID_IMAGES = 64


class Distillation:
    """The task of `loop.run` that turns a teacher into a one-step generator."""

    def __init__(self, config: TrainConfig, parts: Parts, world: World) -> None:
        run, device = config.run, world.device
        self.config, self.world, self.batch = config, world, run.batch
        self.local_batch, self.micro_batch = split_batch(run.batch, run.batch_gpu, world.size)
        # channels_last is what tensor cores and oneDNN read without a layout copy
        self.generator = parts.generator.to(device, memory_format=torch.channels_last).train()
        self.features = parts.features.to(device)
        self.heads = parts.heads.to(device, memory_format=torch.channels_last).train()
        self.ema = Ema(self.generator, config.generator.ema_halflife_mimg * 1e6, config.generator.ema_rampup)
        self._head_weights = [p for p in self.heads.parameters() if p.requires_grad]
        r1_interval = config.loss.r1_interval if config.loss.r1_gamma else 0
        g_optimizer = make_adam(self.generator.parameters(), config.generator.g_lr)
        d_optimizer = make_adam(self.heads.parameters(), config.discriminator.d_lr, lazy_interval=r1_interval)
        self.g_guard = StepGuard("generator", g_optimizer, world, run.max_skipped_steps)
        self.d_guard = StepGuard("discriminator", d_optimizer, world, run.max_skipped_steps)
        self.r1_interval = r1_interval
        self.random = RandomState(run.seed, world)
        self.averages = Averages()
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
        )
        self._grid_latents, self._grid_labels = self._fixed_latents()

    def iteration(self, images: int) -> None:
        """One G step, one D step, and an R1 step of its own every `r1_interval` iterations."""
        real, labels = next(self.stream)
        real = real.float() / 127.5 - 1
        if self.generator_step(labels):
            self.ema.update(images, self.batch)
        self.discriminator_step(real, labels)
        number = images // self.batch
        if self.r1_interval and number and number % self.r1_interval == 0:
            self.r1_step(real, labels)

    def generator_step(self, labels: Tensor | None) -> bool:
        """softplus(-D(G(z))) through the frozen backbones into the weights of G that train."""
        self._train_heads(False)
        for _, label in self._micro_batches(None, labels):
            fake = self._discriminate(self._fakes(label), label)
            # a loss against the teacher (the paper's ablation) would be added to this one
            loss = generator_loss(fake, self.config.loss.logit_reduction, self.local_batch)
            self.averages.add("loss_g", loss)
            loss.backward()
        return self.g_guard.step()

    def discriminator_step(self, real: Tensor, labels: Tensor | None) -> bool:
        """softplus(D(G(z))) + softplus(-D(x)) into the heads; the frozen features need no graph."""
        self._train_heads(True)
        for part, label in self._micro_batches(real, labels):
            with torch.no_grad():
                fake_features = self.features(self._fakes(label))
                real_features = self.features(part)
            fake, true = self.heads(fake_features, label), self.heads(real_features, label)
            loss = discriminator_loss(fake, true, self.config.loss.logit_reduction, self.local_batch)
            self.averages.add("loss_d", loss)
            self.averages.add("logit_fake", mean_logit(fake))
            self.averages.add("logit_real", mean_logit(true))
            loss.backward()
        return self.d_guard.step()

    def r1_step(self, real: Tensor, labels: Tensor | None) -> bool:
        """gamma / 2 ||d D / d x||^2, times the interval between such steps (lazy regularisation)."""
        self._train_heads(True)
        for part, label in self._micro_batches(real, labels):
            part = part.detach().requires_grad_()
            penalty = r1_penalty(part, self._discriminate(part, label))
            self.averages.add("r1", penalty.mean())
            loss = penalty.sum() * (self.config.loss.r1_gamma / 2 * self.r1_interval / self.local_batch)
            loss.backward()
        return self.d_guard.step()

    def _train_heads(self, train: bool) -> None:
        """Without gradients wanted, autograd computes none for the heads' weights; a frozen class table stays frozen."""
        for weight in self._head_weights:
            weight.requires_grad_(train)

    def _discriminate(self, images: Tensor, labels: Tensor | None) -> Logits:
        return self.heads(self.features(images), labels)

    def _fakes(self, labels: Tensor | None) -> Tensor:
        net = self.generator
        shape = (self.micro_batch, net.img_channels, net.img_resolution, net.img_resolution)
        latents = torch.randn(shape, device=self.world.device, generator=self.random.generator)
        return one_step(net, latents, labels)

    def _micro_batches(self, real: Tensor | None, labels: Tensor | None) -> Iterator[tuple[Any, Any]]:
        count = self.local_batch // self.micro_batch
        parts = [None] * count if real is None else real.split(self.micro_batch)
        label_parts = [None] * count if labels is None else labels.split(self.micro_batch)
        return zip(parts, label_parts, strict=True)

    def _fixed_latents(self) -> tuple[Tensor, Tensor | None]:
        net, device = self.generator, self.world.device
        random = torch.Generator().manual_seed(self.config.run.seed)
        latents = torch.randn(
            GRID_IMAGES, net.img_channels, net.img_resolution, net.img_resolution, generator=random
        ).to(device)
        if not net.label_dim:
            return latents, None
        classes = torch.arange(GRID_IMAGES, device=device) % net.label_dim
        return latents, torch.nn.functional.one_hot(classes, net.label_dim).float()

    def tick(self, images: int) -> dict[str, float]:
        """A sample grid of the averaged generator from fixed latents, and the counts of skipped steps."""
        with torch.no_grad():
            samples = one_step(self.ema.net, self._grid_latents, self._grid_labels)
        save_grid(samples, self.config.run_dir / "samples" / f"{images // 1000:06d}k.png")
        return {"skipped_g": float(self.g_guard.skipped), "skipped_d": float(self.d_guard.skipped)}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        sections = {
            "generator": self.generator.state_dict(),
            "ema": self.ema.net.state_dict(),
            "heads": self.heads.state_dict(),
            "projection": self.features.projection_state(),
            "g_optimizer": optimizer_tensors(self.g_guard.optimizer),
            "d_optimizer": optimizer_tensors(self.d_guard.optimizer),
            "random": self.random.tensors(),
        }
        values = {
            "g_optimizer": optimizer_values(self.g_guard.optimizer),
            "d_optimizer": optimizer_values(self.d_guard.optimizer),
            "stream": self.stream.state_dict(),
            "skipped": [self.g_guard.skipped, self.d_guard.skipped],
        }
        return sections, values

    def restore(self, saved: Checkpoint) -> None:
        saved.load_module("generator", self.generator)
        saved.load_module("ema", self.ema.net)
        saved.load_module("heads", self.heads)
        self.features.load_projection_state(saved.section("projection"))
        saved.load_optimizer("g_optimizer", self.g_guard.optimizer)
        saved.load_optimizer("d_optimizer", self.d_guard.optimizer)
        self.random.restore(saved.section("random"), saved.values["images"])
        self.stream.load_state_dict(saved.values["stream"])
        self.g_guard.skipped, self.d_guard.skipped = saved.values["skipped"]

    def export(self, run_dir: Path) -> None:
        save_network(self.ema.net, run_dir / "generator_ema")
