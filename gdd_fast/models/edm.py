"""EDM's U-Nets: NCSN++ and DDPM++ (`SongUNet`) and ADM (`DhariwalUNet`).

Architectures: Song et al., arXiv 2011.13456; Dhariwal & Nichol, arXiv 2105.05233; both as configured by Karras et al.,
arXiv 2206.00364 (EDM). Names, shapes, arguments and initialisation equal EDM's, so its weights load unchanged.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.models.arguments import (
    check_choice,
    check_filter,
    check_probabilities,
    check_resolutions,
    check_sizes,
)
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.modules import Conv2d, FourierEmbedding, GroupNorm, Init, Linear, PositionalEmbedding, merge
from gdd_fast.ops.residual import OPERATOR


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


class SongUNet(nn.Module):
    """NCSN++ and DDPM++. The defaults are DDPM++'s; `ncsnpp()` and `ddpmpp()` give EDM's two sets of arguments.

    Args (EDM's names):
        img_resolution, in_channels, out_channels: of the images.
        label_dim: number of classes, 0 without.
        augment_dim: size of the augmentation label of EDM's training, 0 without.
        model_channels, channel_mult, num_blocks: width, its multiplier at each resolution, blocks at each.
        channel_mult_emb, channel_mult_noise: width of the embedding and of the noise level's part of it.
        attn_resolutions: resolutions with self-attention (one head).
        dropout, label_dropout: probabilities, in training mode only.
        embedding_type: "positional" | "fourier".
        encoder_type: "standard" | "skip" | "residual".
        decoder_type: "standard" | "skip".
        resample_filter: taps of the up- and downsampling filter.

    Raises ConfigError for arguments that cannot make a network.
    """

    operator = OPERATOR
    backend: Backend = "auto"

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution,
            channel_mult,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            channel_mult_noise=channel_mult_noise,
            num_blocks=num_blocks,
            label_dim=label_dim,
            augment_dim=augment_dim,
        )
        check_resolutions(attn_resolutions)
        check_probabilities(dropout=dropout, label_dropout=label_dropout)
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        check_filter(resample_filter)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = Init("xavier_uniform")
        init_zero = Init("xavier_uniform", weight=1e-5)

        def block(cin: int, cout: int, *, attend: bool = False, **sampling: bool) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                num_heads=int(attend),
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                init=init,
                init_zero=init_zero,
                init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)),
                **sampling,
            )

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True, sin_first=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels, sin_first=True)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.enc = nn.ModuleDict()
        channels, aux_channels = model_channels, in_channels
        skips = []
        for level, mult in enumerate(channel_mult):
            size = _size(img_resolution, level)
            if level == 0:
                self.enc[f"{size}_conv"] = Conv2d(in_channels, channels, 3, init=init)
            else:
                self.enc[f"{size}_down"] = block(channels, channels, down=True)
                aux = {"down": True, "resample_filter": resample_filter}
                if encoder_type == "skip":
                    self.enc[f"{size}_aux_down"] = Conv2d(aux_channels, aux_channels, 0, **aux)
                    self.enc[f"{size}_aux_skip"] = Conv2d(aux_channels, channels, 1, init=init)
                elif encoder_type == "residual":
                    self.enc[f"{size}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, **aux, conv_first=True, init=init
                    )
                    aux_channels = channels
            skips.append(channels)
            for index in range(num_blocks):
                cin, channels = channels, model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.enc[f"{size}_block{index}"] = block(cin, channels, attend=attend)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = _size(img_resolution, level)
            if level == last:
                self.dec[f"{size}_in0"] = block(channels, channels, attend=True)
                self.dec[f"{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                cin, channels = channels + skips.pop(), model_channels * mult
                attend = index == num_blocks and img_resolution >> level in attn_resolutions
                self.dec[f"{size}_block{index}"] = block(cin, channels, attend=attend)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{size}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{size}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{size}_aux_conv"] = Conv2d(channels, out_channels, 3, init=init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Images (N, C, H, W), noise levels (N or 1,), labels (N or 1, dim) -> (N, out_channels, H, W) as `x`.

        Labels and the embedding are float32; `x`'s dtype is what the convolutions compute in.
        """
        emb = self.embed(noise_labels, class_labels, augment_labels, batch=x.shape[0])

        # With each map go its statistics, for the norm that reads it, if what made the map has taken them.
        skips = []
        aux, statistics = x, None
        for name, layer in self.enc.items():
            match layer_role(name):
                case "aux_down":
                    aux = layer(aux)
                case "aux_skip":
                    x, statistics = merge(x, layer(aux), backend=self.backend), None
                    skips[-1] = x, statistics
                case "aux_residual":
                    x, statistics = merge(x, layer(aux), math.sqrt(0.5), backend=self.backend), None
                    aux, skips[-1] = x, (x, statistics)
                case "conv":
                    x = layer(x)
                    skips.append((x, None))
                case _:
                    x, statistics = layer(x, emb, statistics=statistics, return_statistics=True)
                    skips.append((x, statistics))

        image = None
        normed = x
        for name, layer in self.dec.items():
            match layer_role(name):
                case "aux_up":
                    image = layer(image)
                case "aux_norm":
                    normed = layer(x, statistics=statistics)
                case "aux_conv":
                    y = layer(normed)
                    image = y if image is None else merge(image, y, backend=self.backend)
                case _:
                    x, statistics = _decode(layer, x, statistics, skips, emb)
        return image

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, *, batch: int
    ) -> Tensor:
        """The conditioning of every block, float32 (N or 1, emb_channels)."""
        emb = self.map_noise(noise_labels)
        if self.map_label is not None:
            labels = _drop_labels(class_labels, self.label_dropout, batch) if self.training else class_labels
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(nn.Module):
    """ADM. Arguments as in `SongUNet`; attention has heads of 64 channels (none below 64 channels, as in EDM)."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution,
            channel_mult,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            label_dim=label_dim,
            augment_dim=augment_dim,
        )
        check_resolutions(attn_resolutions)
        check_probabilities(dropout=dropout, label_dropout=label_dropout)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0.0)

        def block(cin: int, cout: int, *, attend: bool = False, **sampling: bool) -> UNetBlock:
            heads = cout // 64 if attend else 0
            return UNetBlock(
                cin, cout, emb_channels, num_heads=heads, dropout=dropout, init=init, init_zero=init_zero, **sampling
            )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=init_label) if label_dim else None

        self.enc = nn.ModuleDict()
        channels = model_channels * channel_mult[0]
        skips = []
        for level, mult in enumerate(channel_mult):
            size = _size(img_resolution, level)
            if level == 0:
                self.enc[f"{size}_conv"] = Conv2d(in_channels, channels, 3, init=init)
            else:
                self.enc[f"{size}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for index in range(num_blocks):
                cin, channels = channels, model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.enc[f"{size}_block{index}"] = block(cin, channels, attend=attend)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = _size(img_resolution, level)
            if level == len(channel_mult) - 1:
                self.dec[f"{size}_in0"] = block(channels, channels, attend=True)
                self.dec[f"{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                cin, channels = channels + skips.pop(), model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.dec[f"{size}_block{index}"] = block(cin, channels, attend=attend)
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, out_channels, 3, init=init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """As `SongUNet.forward`."""
        emb = self.embed(noise_labels, class_labels, augment_labels, batch=x.shape[0])
        skips = []
        statistics = None
        for layer in self.enc.values():
            if isinstance(layer, UNetBlock):
                x, statistics = layer(x, emb, statistics=statistics, return_statistics=True)
            else:
                x = layer(x)
            skips.append((x, statistics))
        for layer in self.dec.values():
            x, statistics = _decode(layer, x, statistics, skips, emb)
        return self.out_conv(self.out_norm(x, statistics=statistics))

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, *, batch: int
    ) -> Tensor:
        """The conditioning of every block, float32 (N or 1, emb_channels)."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = _drop_labels(class_labels, self.label_dropout, batch) if self.training else class_labels
            emb = emb + self.map_label(labels)
        return F.silu(emb)


ARCHITECTURES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def _decode(
    block: UNetBlock, x: Tensor, statistics: Tensor | None, skips: list[tuple[Tensor, Tensor | None]], emb: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A decoder's block on x and, where it takes more channels, the latest of the skips; its result's statistics."""
    if block.in_channels == x.shape[1]:
        return block(x, emb, statistics=statistics, return_statistics=True)
    skip, skip_statistics = skips.pop()
    return block((x, skip), emb, statistics=(statistics, skip_statistics), return_statistics=True)


def _size(img_resolution: int, level: int) -> str:
    return f"{img_resolution >> level}x{img_resolution >> level}"


def layer_role(name: str) -> str:
    """What a layer of the encoder or decoder is for: `conv`, `block0`, `aux_down`, ... of `32x32_conv`, ..."""
    return name.partition("_")[2]


def _drop_labels(labels: Tensor, probability: float, batch: int) -> Tensor:
    """Labels with whole rows set to zero at random, for guidance without a classifier."""
    if not probability:
        return labels
    return labels * (torch.rand(batch, 1, device=labels.device) >= probability).to(labels.dtype)
