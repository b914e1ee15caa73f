"""EDM's U-Nets, NCSN++ and DDPM++ (`SongUNet`) and ADM (`DhariwalUNet`), with EDM's arguments for each.

As configured by Karras et al., arXiv 2206.00364 (EDM). Names, shapes, arguments and initialisation are EDM's, so its
weights load unchanged.
"""

import re
from typing import Any

from torch import nn

from gdd_fast.models.dhariwal_unet import DhariwalUNet
from gdd_fast.models.song_unet import SongUNet
from gdd_fast.models.unet import layer_role

__all__ = ["ARCHITECTURES", "DhariwalUNet", "SongUNet", "adm", "ddpmpp", "layer_role", "ncsnpp"]

ARCHITECTURES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def ncsnpp(**overrides: Any) -> dict[str, Any]:
    """EDM's arguments for NCSN++ at 32x32 (at 64x64 it uses `channel_mult=[1, 2, 2, 2]`), with `overrides`."""
    return {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        **overrides,
    }


def ddpmpp(**overrides: Any) -> dict[str, Any]:
    """EDM's arguments for DDPM++ at 32x32 (at 64x64 it uses `channel_mult=[1, 2, 2, 2]`), with `overrides`."""
    return {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        **overrides,
    }


def adm(**overrides: Any) -> dict[str, Any]:
    """EDM's arguments for ADM at 64x64, with `overrides`."""
    return {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4], **overrides}


_SMALL = {"img_resolution": 32, "img_channels": 3}
_LARGE = {"img_resolution": 64, "img_channels": 3}
_FACES = {"channel_mult": [1, 2, 2, 2]}

PUBLISHED: dict[str, dict[str, Any]] = {
    "edm-cifar10-32x32-uncond-ve": {**_SMALL, **ncsnpp()},
    "edm-cifar10-32x32-uncond-vp": {**_SMALL, **ddpmpp()},
    "edm-cifar10-32x32-cond-ve": {**_SMALL, "label_dim": 10, **ncsnpp()},
    "edm-cifar10-32x32-cond-vp": {**_SMALL, "label_dim": 10, **ddpmpp()},
    "edm-afhqv2-64x64-uncond-ve": {**_LARGE, **ncsnpp(**_FACES)},
    "edm-afhqv2-64x64-uncond-vp": {**_LARGE, **ddpmpp(**_FACES)},
    "edm-ffhq-64x64-uncond-ve": {**_LARGE, **ncsnpp(**_FACES)},
    "edm-ffhq-64x64-uncond-vp": {**_LARGE, **ddpmpp(**_FACES)},
    "edm-imagenet-64x64-cond-adm": {**_LARGE, "label_dim": 1000, **adm()},
}
"""Arguments of `EDMPrecond`, by the name of EDM's file, without the augmentation layer (`augment_dim`)."""

_PRESETS = {
    "cifar10-uncond": "edm-cifar10-32x32-uncond-ve",
    "cifar10-cond": "edm-cifar10-32x32-cond-ve",
    "afhqv2-64": "edm-afhqv2-64x64-uncond-ve",
    "ffhq-64": "edm-ffhq-64x64-uncond-ve",
    "imagenet-64": "edm-imagenet-64x64-cond-adm",
}


def published(name: str) -> dict[str, Any] | None:
    """The arguments of the network called `name`: a preset's teacher or one of EDM's files; None for any other."""
    preset = re.sub(r"-gdd(-i)?$", "", name)
    return PUBLISHED.get(_PRESETS.get(preset, name.removesuffix(".pkl")))
