"""The smallest distillation that is one: 16x16 grey images, a network of 8 channels, the real lite0 at 32x32."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_fast.config import TrainConfig, override, preset
from gdd_fast.data import write_edm_zip
from gdd_fast.distill import components
from gdd_fast.distill.gdd import Distillation
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.ranks import World
from gdd_fast.training import loop

SIZE = 16
CLASSES = 3
BATCH = 4
ALONE = World(0, 1, torch.device("cpu"))


def tiny_network(label_dim: int = 0, channels: int = 1) -> EDMPrecond:
    """An EDM network with every layer that a freeze level names, and no weight at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = EDMPrecond(
            SIZE,
            channels,
            label_dim,
            model_type="SongUNet",
            model_channels=8,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[8],
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def write_inputs(folder: Path, label_dim: int = 0, images: int = 24) -> None:
    """`folder`/teacher and `folder`/data.zip."""
    save_network(tiny_network(label_dim), folder / "teacher")
    pixels = np.random.default_rng(0).integers(0, 256, (images, 1, SIZE, SIZE), np.uint8)
    write_edm_zip(folder / "data.zip", pixels, np.arange(images) % label_dim if label_dim else None)


FLAGS = {
    "backbones": ("tf_efficientnet_lite0",),
    "disc_resolution": 32,
    "head_width": 0.0625,
    "g_precision": "fp32",
    "d_precision": "fp32",
    "r1_precision": "fp32",
    "class_embedding": "learned",
    "batch": BATCH,
    "r1_interval": 2,
    "ema_halflife_mimg": 2e-5,
    "tick_kimg": 0.008,
    "device": "cpu",
    "duration_mimg": 2e-5,
}


def tiny_config(folder: Path, **settings: Any) -> TrainConfig:
    """A run on `write_inputs(folder)`; `settings` by their flag names, in whatever section they stand."""
    inputs = {"data": str(folder / "data.zip"), "teacher": str(folder / "teacher"), "run_dir": folder / "run"}
    return override(preset("cifar10-uncond-gdd-i"), **{**inputs, **FLAGS, **settings})


def tiny_flags(folder: Path, **settings: Any) -> list[str]:
    """The same as flags of `gdd_fast.train`."""
    settings = {
        "preset": "cifar10-uncond-gdd-i",
        "data": folder / "data.zip",
        "teacher": folder / "teacher",
        "run_dir": folder / "run",
        **FLAGS,
        **settings,
    }
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def tiny_task(config: TrainConfig, world: World = ALONE) -> Distillation:
    return Distillation(config, components.build(config), world)


def schedule_of(config: TrainConfig) -> loop.Schedule:
    return loop.Schedule.of(config.run)
