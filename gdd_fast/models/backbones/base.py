"""The base of frozen backbones, and the folding of their batch norms."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvNorm(NamedTuple):
    """A convolution and the batch norm that follows it, both attributes (or items) of `parent`."""

    parent: nn.Module
    conv: str
    norm: str


class Backbone(nn.Module):
    """An ImageNet network that returns four feature maps. Frozen, and always in eval mode: `train()` has no effect.

    `forward(x)` takes float `(N, 3, H, W)`, normalised with `mean` and `std` (those of pixels in [0, 1]), and returns
    four maps from the finest (or shallowest) to the coarsest (or deepest): `(N, tap_channels[i], H / tap_strides[i],
    W / tap_strides[i])`.
    """

    name: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    tap_channels: tuple[int, int, int, int]
    tap_strides: tuple[int, int, int, int]
    fixed_resolution: int | None = None
    unused_weights: tuple[str, ...] = ()
    """Prefixes of tensors in published weight files that the four maps do not need (classifiers)."""

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def conv_norms(self) -> Iterator[ConvNorm]:
        """Every convolution that is directly followed by a batch norm."""
        return iter(())


@torch.no_grad()
def probe_batch_norm(backbone: Backbone) -> Backbone:
    """Update every batch norm's running statistics once, by passing an all-zero 256 x 256 image in training mode.

    GDD's public code leaves its backbones like this: it first finds the sizes of their maps with such an image. Call
    this before `fold_batch_norm`; returns `backbone`, unchanged if it has no batch norm.
    """
    norms = [parent.get_submodule(norm) for parent, _, norm in backbone.conv_norms()]
    if not norms:
        return backbone
    for norm in norms:
        norm.train()
    weight = next(backbone.parameters())
    backbone(weight.new_zeros(1, 3, 256, 256))
    for norm in norms:
        norm.eval()
    return backbone


@torch.no_grad()
def fold_batch_norm(backbone: Backbone) -> Backbone:
    """Fold every batch norm into the convolution before it, in place; returns `backbone`.

    The scale and shift are computed in float64, so outputs change only by float32 rounding. Folding again, or a network
    without batch norm, changes nothing. Afterwards `state_dict()` has a bias for each such convolution and no batch
    norm, so load published weights first.
    """
    for parent, conv_name, norm_name in list(backbone.conv_norms()):
        conv: Any = parent.get_submodule(conv_name)
        norm: Any = parent.get_submodule(norm_name)
        if isinstance(norm, nn.Identity):
            continue
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        if conv.bias is not None:
            bias += conv.bias.double() * scale
        conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
        setattr(parent, norm_name, nn.Identity())
    return backbone
