"""What EDM's U-Nets share: names of layers, a decoder's block and its skip, labels dropped in training."""

import torch
from torch import Tensor, nn


def decode(
    block: nn.Module, x: Tensor, statistics: Tensor | None, skips: list[tuple[Tensor, Tensor | None]], emb: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A decoder's block on x and, where it takes more channels, the latest of the skips; its result's statistics."""
    if block.in_channels == x.shape[1]:
        return block(x, emb, statistics=statistics, return_statistics=True)
    skip, skip_statistics = skips.pop()
    return block((x, skip), emb, statistics=(statistics, skip_statistics), return_statistics=True)


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
