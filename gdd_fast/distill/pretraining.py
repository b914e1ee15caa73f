"""Training a teacher with EDM's denoising loss on real images.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), section 5:
`E[lambda(sigma) ||D(y + sigma n; sigma) - y||^2]`, `ln sigma ~ N(-1.2, 1.2^2)`,
`lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2`.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from gdd_fast.acceleration import accelerate_foreign
from gdd_fast.config import check_seed, check_values
from gdd_fast.data import BatchStream, ImageDataset, load_data
from gdd_fast.data.fingerprint import dataset_digest
from gdd_fast.device import fast_layout
from gdd_fast.distill.components import OPERATORS, check_fit, load_teacher
from gdd_fast.distill.velocity import velocity_loss, with_velocity
from gdd_fast.errors import ConfigError
from gdd_fast.layers.backends import choose_backend
from gdd_fast.models.edm import adm, ddpmpp, ncsnpp
from gdd_fast.models.files.load import holds_network, network_digest
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.models.teachers.unet2d import UNet2DPrecond
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.ranks import World
from gdd_fast.report import report_page
from gdd_fast.sampling.grid import save_grid
from gdd_fast.sampling.sampler import heun
from gdd_fast.sampling.seeds import latents
from gdd_fast.settings import Count, Limit, LoopSettings, NotNegative, Positive
from gdd_fast.training.batches import chunks, split_batch
from gdd_fast.training.checkpoint import Checkpoint, Sections, optimizer_tensors, optimizer_values
from gdd_fast.training.ema import Ema
from gdd_fast.training.finite import FiniteWatch
from gdd_fast.training.optimizer import AdamEma, StepGuard
from gdd_fast.training.output import Averages, reading_bar
from gdd_fast.training.random_state import RandomState

SIGMA_DATA = 0.5
GRID_SEEDS = range(36)
TEACHER = "teacher"  # subfolder of the run folder that holds the network


@dataclass(frozen=True)
class PretrainConfig(LoopSettings):
    """All settings of a pretraining run. Field names are flag names."""

    data: str = "demo"
    """EDM-style zip, folder or npz of images; `demo` is the bundled set."""
    run_dir: Path = Path("runs/teacher")
    """Output folder; running the same command again resumes the run in it."""
    teacher: str | None = None
    """Continue from this network instead of a new one: a diffusers pipeline with a schedule defined by betas, as a
    folder or the name of a Hub repository. It learns to predict v at the times of its schedule; `--arch`,
    `--model-channels` and the other settings of a new network are then ignored."""
    arch: Literal["ncsnpp", "ddpmpp", "adm"] = "ncsnpp"
    """Network architecture."""
    model_channels: Count = 32
    """Channels of the first level; EDM uses 128 (ncsnpp, ddpmpp) or 192 (adm)."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Channel multiplier of each level."""
    num_blocks: Count = 2
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] = (8,)
    """Resolutions with self-attention."""
    dropout: NotNegative = 0.0
    """Dropout probability; EDM uses 0.13 for CIFAR-10."""
    cond: bool = False
    """Train class-conditionally."""
    x_flip: bool = True
    """Add the mirror image of every image to the data set."""
    batch: Count = 128
    """Images per iteration, over all GPUs."""
    batch_gpu: Annotated[int | None, Limit(1)] = None
    """Most images per pass through the network; gradients accumulate over several passes."""
    lr: Positive = 1e-3
    """Adam learning rate; betas (0.9, 0.999), eps 1e-8."""
    lr_rampup_kimg: NotNegative = 20.0
    """Thousands of images over which the learning rate rises from 0."""
    ema_halflife_mimg: Positive = 0.5
    """Half-life of the moving average, in millions of images."""
    ema_rampup: NotNegative = 0.05
    """The half-life is at most this fraction of the images seen so far."""
    duration_mimg: Positive = 1.0
    """Length of the run, in millions of images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision of the network."""
    seed: int = 0
    """Seed of the initialisation, the data order and the noise."""
    workers: Annotated[int, Limit(0)] = 2
    """Processes that decode images when the data set is too large to hold in memory."""
    data_memory_gib: NotNegative = 4.0
    """Hold the data set as one uint8 tensor on the training device if it is no larger than this."""
    tick_kimg: Positive = 50.0
    """Thousands of images per tick; each tick writes a line of metrics and a grid of samples."""
    checkpoint_ticks: Count = 5
    """Ticks between checkpoints."""

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work. Reads no file; the network checks its own."""
        check_values(self)
        check_seed(self.seed)
        if self.dropout >= 1:
            raise ConfigError(f"--dropout must be below 1, not {self.dropout}")


def denoising_loss(net: nn.Module, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
    """EDM's weighted denoising loss per image: images (N, C, H, W) in [-1, 1] -> (N,), summed over C, H, W."""
    normal = torch.randn([len(images), 1, 1, 1], device=images.device, generator=random)
    sigma = (1.2 * normal - 1.2).exp()
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    noise = torch.randn(images.shape, device=images.device, generator=random) * sigma
    return (weight * (net(images + noise, sigma, labels) - images) ** 2).sum(dim=(1, 2, 3))


class Pretraining:
    """The task of `loop.run` that trains a teacher."""

    remedy = "a lower --lr, or with --precision fp32,"

    def __init__(self, config: PretrainConfig, world: World, dataset: ImageDataset | None = None) -> None:
        """`dataset`: the data set that --data names, if it is already open."""
        config.validate()
        self.config, self.world = config, world
        dataset = load_data(config.data, use_labels=config.cond) if dataset is None else dataset
        self.contents = {"data": dataset_digest(dataset)}
        self.batch = config.batch
        self.local_batch, self.micro_batch = split_batch(config.batch, config.batch_gpu, world.size)
        net = _network(config, dataset)
        if config.teacher:
            self.contents["teacher"] = network_digest(net)
        self.loss = velocity_loss if isinstance(net, UNet2DPrecond) else denoising_loss
        self.operators = choose_backend(config.backend, world.device.type, [net], OPERATORS)
        with reading_bar(world.is_main) as progress:
            self.stream = BatchStream(
                dataset,
                self.local_batch,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                x_flip=config.x_flip,
                device=world.device,
                workers=config.workers,
                memory_limit=int(config.data_memory_gib * 2**30),
                progress=progress,
            )
        layout = fast_layout(world.device, config.precision)
        self.net = net.to(world.device, memory_format=layout).train()  # type: ignore[call-overload]
        accelerate_foreign(self.net, config.backend)
        self.ema = Ema(self.net, config.ema_halflife_mimg * 1e6, config.ema_rampup)
        self.optimizer = AdamEma(
            self.net.parameters(), config.lr, averages=self.ema.averages, backend=self.operators["adam_ema"]
        )
        self.guard = StepGuard("training", self.optimizer, world, config.max_skipped_steps)
        self.watch = FiniteWatch({"network": self.net}) if config.debug_finite else None
        self.random = RandomState(config.seed, world)
        self.averages = Averages()

    def iteration(self, images: int) -> None:
        rampup = self.config.lr_rampup_kimg * 1e3
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, images / rampup if rampup else 1.0)
        self.optimizer.average_weight.fill_(1 - self.ema.decay(images, self.batch))
        real, labels = next(self.stream)
        label_parts = chunks(labels, self.micro_batch, self.local_batch)
        watched = self.watch.step("training", images, self.optimizer) if self.watch else contextlib.nullcontext()
        with watched, self.random.for_layers(images):
            for part, label in zip(real.split(self.micro_batch), label_parts, strict=True):
                loss = self.loss(self.net, part.float() / 127.5 - 1, label, self.random.generator)
                (loss.sum() / self.local_batch).backward()
                self.averages.add("loss", loss.mean())
            self.averages.add("grad_norm", self.guard.step())

    def tick(self, images: int) -> dict[str, float]:
        """Write a sample grid of the averaged network, as `gdd_fast.sample` does; the count of skipped steps."""
        if self.world.is_main:
            net = self.ema.net
            shape = (net.img_channels, net.img_resolution, net.img_resolution)
            z, labels = latents(GRID_SEEDS, shape, net.label_dim, self.world.device)  # type: ignore[arg-type]
            with torch.no_grad():
                samples = heun(net, z, labels)
            save_grid(to_uint8(samples), self.config.run_dir / "samples" / f"{images:09d}.png")
        return {"skipped_steps": float(self.guard.skipped)}

    def state(self) -> tuple[Sections, dict[str, Any]]:
        sections = {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
            "random": self.random.tensors(),
        }
        values = {"optimizer": optimizer_values(self.optimizer), "stream": self.stream.state_dict()}
        return sections, {**values, "skipped": self.guard.skipped}

    def restore(self, saved: Checkpoint) -> None:
        saved.load_module("net", self.net)
        saved.load_module("ema", self.ema.net)
        saved.load_optimizer("optimizer", self.optimizer)
        self.random.restore(saved.section("random"), saved.values["images"])
        self.stream.load_state_dict(saved.values["stream"])
        self.guard.restore(saved.values["skipped"])

    def export(self, run_dir: Path, sections: Sections) -> None:
        # the network last, as `exported` checks it: after a kill in between, the page is written again too
        report_page.refresh(run_dir)
        save_network(self.ema.net, run_dir / TEACHER, weights=sections["ema"])  # type: ignore[arg-type]

    def exported(self, run_dir: Path) -> bool:
        net: Any = self.ema.net
        return self.world.is_main and report_page.is_there(run_dir) and holds_network(net, run_dir / TEACHER)

    def close(self) -> None:
        self.stream.close()


def _network(config: PretrainConfig, dataset: ImageDataset) -> EDMPrecond | UNet2DPrecond:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.teacher:
        net = with_velocity(load_teacher(config.teacher), config.teacher)
        check_fit(net, dataset, config.data)
        net.dtype = dtype
        return net
    build = {"ncsnpp": ncsnpp, "ddpmpp": ddpmpp, "adm": adm}[config.arch]
    options = build(
        model_channels=config.model_channels,
        channel_mult=list(config.channel_mult),
        num_blocks=config.num_blocks,
        attn_resolutions=list(config.attn_resolutions),
        dropout=config.dropout,
    )
    sizes = dataset.resolution, dataset.channels, dataset.label_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EDMPrecond(*sizes, sigma_data=SIGMA_DATA, dtype=dtype, **options)
