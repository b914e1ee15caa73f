"""A folded U-Net, its blocks and its attention, built from folded layers. `fold` makes it."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from gdd_fast.engine.folded_layers import (
    Convolution,
    FusedProjection,
    FusedResidual,
    Identity,
    Norm,
    Projection,
    Resampled,
    Resampling,
    Target,
    memory_format,
)
from gdd_fast.layers.skip_pair import Pair, Statistics
from gdd_fast.ops.attention import attention, attention_inference
from gdd_fast.ops.small_maps import MOST_TOKENS, small_attention


class Attention(nn.Module):
    """Self-attention with its residual. `qkv` outputs all queries, then all keys, then all values."""

    def __init__(
        self,
        norm: Norm,
        qkv: Convolution,
        proj: Convolution,
        heads: int,
        end: Identity | FusedResidual | None,
        target: Target,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.proj = proj
        self.heads = heads
        self.end = end
        self.backend = target.attention
        self.traced = target.convolve == "traced"
        self.small = target.small

    def forward(self, x: Tensor, statistics: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h = self.qkv(self.norm(x, statistics))
        if self.small and h.shape[2] * h.shape[3] <= MOST_TOKENS:
            h = small_attention(h, self.heads)
        elif self.traced:
            h = attention(h, self.heads, "blocks", self.backend)
        else:
            h = attention_inference(h, self.heads, self.backend)
        return (self.proj.add_to(x, h), None) if self.end is None else self.end(self.proj, h, x)


class Block(nn.Module):
    """A residual block. In a conditional network, `condition` says how its rows of the table enter its second norm."""

    def __init__(
        self,
        *,
        norm0: Norm,
        resample: Resampling | None,
        conv0: Convolution,
        norm1: Norm,
        conv1: Convolution,
        skip: Identity | FusedResidual | Projection | FusedProjection | Resampled,
        attention: Attention | None,
        condition: Literal["add", "scale_shift"] | None,
        paired: bool,
    ) -> None:
        super().__init__()
        self.norm0 = norm0
        self.resample = resample
        self.conv0 = conv0
        self.norm1 = norm1
        self.conv1 = conv1
        self.skip = skip
        self.attention = attention
        self.condition = condition
        self.paired = paired

    def forward(self, x: Tensor | Pair, statistics: Statistics, rows: Iterator[Tensor]) -> tuple[Tensor, Tensor | None]:
        """`x` (N, C, H, W) or a pair, with its statistics -> the resulting map with its statistics.

        `rows` are (N, C) each; a conditional block takes the next ones.
        """
        h = self.norm0(x, statistics)
        if self.resample is not None:
            h = self.resample(h)
        h = self.conv0(h)
        match self.condition:
            case None:
                h = self.norm1(h)
            case "add":
                h = self.norm1(h, add=next(rows))
            case "scale_shift":
                h = self.norm1(h, scale=next(rows), shift=next(rows))
        h, statistics = self.skip(self.conv1, h, x)
        return (h, statistics) if self.attention is None else self.attention(h, statistics)  # type: ignore[return-value]


class FoldedUNet(nn.Module):
    """A preconditioned U-Net at one noise level, from standard normal latents to images.

    Args:
        encoder, decoder: (role, layer) in order; the roles are those of `gdd_fast.models.edm.layer_role`.
        row_sizes: widths of the conditional blocks' rows, in the order of use; empty without classes.
        aux_scale: factor of the sums on the residual encoder's path.
        latent_scale: factor with which the latents are added to the images.
    """

    def __init__(
        self,
        encoder: list[tuple[str, nn.Module]],
        decoder: list[tuple[str, nn.Module]],
        *,
        row_sizes: list[int],
        aux_scale: float,
        latent_scale: float,
        target: Target,
    ) -> None:
        super().__init__()
        self.encoder_roles, encoder_layers = zip(*encoder, strict=True)
        self.decoder_roles, decoder_layers = zip(*decoder, strict=True)
        self.encoder = nn.ModuleList(encoder_layers)
        self.decoder = nn.ModuleList(decoder_layers)
        self.row_sizes = row_sizes
        self.aux_scale = aux_scale
        self.latent_scale = latent_scale
        self.dtype = target.dtype
        self.channels_last = target.layout is torch.channels_last

    def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
        """Latents float32 (N, C, H, W), rows float32 (N, sum of row_sizes) or None -> images float32 (N, C, H, W)."""
        conditions = iter(() if rows is None else rows.split(self.row_sizes, 1))
        x = aux = latents.to(self.dtype, memory_format=memory_format(self.channels_last))
        statistics: Tensor | None = None
        skips: list[tuple[Tensor, Tensor | None]] = []
        for role, layer in zip(self.encoder_roles, self.encoder, strict=True):
            match role:
                case "conv":
                    x = layer(x)
                    skips.append((x, None))
                case "aux_down":
                    aux = layer(aux)
                case "aux_skip":
                    x, statistics = layer.add_to(x, aux), None  # type: ignore[operator]
                    skips[-1] = x, None
                case "aux_residual":
                    x, statistics = layer(aux, x, self.aux_scale), None
                    aux, skips[-1] = x, (x, None)
                case _:
                    x, statistics = layer(x, statistics, conditions)
                    skips.append((x, statistics))

        image = None
        normed = x
        for role, layer in zip(self.decoder_roles, self.decoder, strict=True):
            match role:
                case "aux_up":
                    up = layer
                case "aux_norm":
                    normed = layer(x, statistics)
                case "aux_conv":
                    y = layer(normed)
                    image = y if image is None else up(image, add=y)
                case _:
                    if layer.paired:
                        skip, skip_statistics = skips.pop()
                        x, statistics = layer((x, skip), (statistics, skip_statistics), conditions)
                    else:
                        x, statistics = layer(x, statistics, conditions)
        return torch.add(image, latents, alpha=self.latent_scale)  # type: ignore[arg-type]
