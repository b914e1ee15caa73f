"""More layers of the real networks: resampling and frozen convolutions, collected as those of shapes.py are, by hooks
while the networks run on the meta device. The rest is what shapes.py has collected.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import NETWORKS, AttentionCall, MapCall, build, call, layers
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.frozen_conv import FrozenConv2d
from gdd_fast.modules import Conv2d

BACKBONES = (("vgg16_bn", 224), ("tf_efficientnet_lite0", 224))
"""The backbones of the CIFAR-10 presets, at their resolution."""


@dataclass(frozen=True)
class ResampleCall:
    """One call of resample2d, less the batch: (channels, resolution) of x; taps of the filter; its padding."""

    channels: int
    resolution: int
    up: bool
    taps: tuple[float, ...]
    padding: int


@dataclass(frozen=True)
class ConvCall:
    """One frozen convolution with a ReLU, less the batch: `size` is the weight's."""

    size: tuple[int, int, int, int]
    resolution: int
    stride: int
    padding: int
    groups: int
    activation: str


@functools.cache
def resample_calls() -> tuple[ResampleCall, ...]:
    """Every distinct call in the generators, in order of first appearance."""
    found: list[ResampleCall] = []

    def hook(layer: Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if not (layer.up or layer.down):
            return
        channels, resolution, padding = inputs[0].shape[1], inputs[0].shape[2], layer.border
        if layer.conv_first:  # the filter comes after the convolution, which has added its border
            channels, resolution, padding = layer.out_channels, resolution + 2 * layer.border, 0
        found.append(ResampleCall(channels, resolution, layer.up, layer.taps, padding))

    for name in NETWORKS:
        _run_hooked(build(name), call, lambda m: m.register_forward_pre_hook(hook) if isinstance(m, Conv2d) else None)
    return tuple(dict.fromkeys(found))


def residual_calls() -> tuple[MapCall, ...]:
    """Every distinct call at the end of the generators' blocks, in order of first appearance."""
    return layers().residuals


def attention_calls() -> tuple[AttentionCall, ...]:
    """Every distinct call in the generators, in order of first appearance."""
    return layers().attentions


def pool_calls() -> tuple[MapCall, ...]:
    """Every distinct pooling in the backbones, in order of first appearance."""
    return layers().pools


@functools.cache
def convolution_calls() -> tuple[ConvCall, ...]:
    """Every distinct frozen convolution with an activation in the folded backbones."""
    convolutions: list[ConvCall] = []

    def convolution(layer: FrozenConv2d, inputs: tuple[Any, ...]) -> None:
        if len(inputs) > 1 and inputs[1] is not None:
            size, x = tuple(layer.weight.shape), inputs[0]
            geometry = (layer.stride[0], layer.padding[0], layer.groups)
            convolutions.append(ConvCall(size, x.shape[2], *geometry, inputs[1]))

    def attach(module: nn.Module) -> Any:
        return module.register_forward_pre_hook(convolution) if isinstance(module, FrozenConv2d) else None

    for name, resolution in BACKBONES:
        with torch.device("meta"):
            net = fold_batch_norm(build_backbone(name, None, resolution))
        _run_hooked(net, lambda n, r=resolution: n(torch.empty((1, 3, r, r), device="meta")), attach)
    return tuple(dict.fromkeys(convolutions))


def _run_hooked(net: nn.Module, run: Callable[[Any], Any], attach: Callable[[nn.Module], Any]) -> None:
    handles = [handle for module in net.modules() if (handle := attach(module)) is not None]
    with torch.no_grad():
        run(net)
    for handle in handles:
        handle.remove()
