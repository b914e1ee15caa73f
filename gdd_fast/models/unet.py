"""What EDM's U-Nets share: the order and names of layers, and the dropping of labels in training."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.ops import residual


class EDMUNet(nn.Module):
    """A U-Net whose constructor puts layers into `enc` and `dec`; they run in that order, each according to its role.

    Its image is the sum of the outputs of `aux_conv` layers; without these, it is the output of `out_conv`.
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
        """Images (N, C, H, W), noise levels (N or 1,), labels (N or 1, dim) -> (N, out_channels, H, W), dtype of `x`.

        Labels and the embedding are float32; convolutions compute in the dtype of `x`.
        """
        emb = self.embed(noise_labels, class_labels, augment_labels, batch=x.shape[0])

        # Each map is passed along with its statistics, for the next norm, if the operator that made it has them.
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
    """The prefix of a level's layer names: `32x32`, `16x16`, ..."""
    return f"{img_resolution >> level}x{img_resolution >> level}"


def layer_role(name: str) -> str:
    """The role of an encoder or decoder layer: `conv`, `block0`, `aux_down`, ... for `32x32_conv`, ..."""
    return name.partition("_")[2]


def drop_labels(labels: Tensor | None, probability: float, batch: int) -> Tensor | None:
    """Labels with whole rows set to zero at random, for classifier-free guidance."""
    if labels is None or not probability:
        return labels
    return labels * (torch.rand(batch, 1, device=labels.device) >= probability).to(labels.dtype)
