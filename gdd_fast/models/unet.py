"""What EDM's U-Nets share: the order of layers and their names, labels dropped in training."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.ops import residual


class EDMUNet(nn.Module):
    """A U-Net whose constructor has put layers into `enc` and `dec`, which run in their order, each by its role.

    Its image is the sum of those that `aux_conv` layers make; without them, `out_conv` makes it.
    """

    operator = residual.OPERATOR
    backend: Backend = "auto"
    enc: nn.ModuleDict
    dec: nn.ModuleDict

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
        skips: list[tuple[Tensor, Tensor | None]] = []
        aux, statistics = x, None
        for name, layer in self.enc.items():
            match layer_role(name):
                case "aux_down":
                    aux = layer(aux)
                case "aux_skip":
                    x, statistics = residual.residual(x, layer(aux), backend=self.backend), None
                    skips[-1] = x, statistics
                case "aux_residual":
                    x, statistics = residual.residual(x, layer(aux), scale=math.sqrt(0.5), backend=self.backend), None
                    aux, skips[-1] = x, (x, statistics)
                case "conv":
                    x = layer(x)
                    skips.append((x, None))
                case _:
                    x, statistics = layer(x, emb, statistics=statistics, return_statistics=True)
                    skips.append((x, statistics))

        image: Any = None
        normed = x
        for name, layer in self.dec.items():
            match layer_role(name):
                case "aux_up":
                    image = layer(image)
                case "aux_norm":
                    normed = layer(x, statistics=statistics)
                case "aux_conv":
                    y = layer(normed)
                    image = y if image is None else residual.residual(image, y, backend=self.backend)
                case _ if layer.in_channels == x.shape[1]:
                    x, statistics = layer(x, emb, statistics=statistics, return_statistics=True)
                case _:
                    skip, its_statistics = skips.pop()
                    both = statistics, its_statistics
                    x, statistics = layer((x, skip), emb, statistics=both, return_statistics=True)
        return image if image is not None else self.out_conv(self.out_norm(x, statistics=statistics))  # type: ignore[operator]

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, *, batch: int
    ) -> Tensor:
        """The conditioning of every block, float32 (N or 1, emb_channels)."""
        raise NotImplementedError


def size_name(img_resolution: int, level: int) -> str:
    """What the names of a level's layers begin with: `32x32`, `16x16`, ..."""
    return f"{img_resolution >> level}x{img_resolution >> level}"


def layer_role(name: str) -> str:
    """What a layer of the encoder or decoder is for: `conv`, `block0`, `aux_down`, ... of `32x32_conv`, ..."""
    return name.partition("_")[2]


def drop_labels(labels: Tensor | None, probability: float, batch: int) -> Tensor | None:
    """Labels with whole rows set to zero at random, for guidance without a classifier."""
    if labels is None or not probability:
        return labels
    return labels * (torch.rand(batch, 1, device=labels.device) >= probability).to(labels.dtype)
