"""EDM's U-Nets: NCSN++ and DDPM++ (`SongUNet`) and ADM (`DhariwalUNet`), and EDM's arguments for each.

As configured by Karras et al., arXiv 2206.00364 (EDM). Names, shapes, arguments and initialisation equal EDM's, so its
weights load unchanged.
"""

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
