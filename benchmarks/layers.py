"""More layers of the real networks, beside those of shapes.py: what resampling, residuals, attention, frozen
convolutions and pooling are called with, collected by hooks while the networks run on the meta device.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checks import tensors
from benchmarks.shapes import NETWORKS, build, call
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.backbones.vgg import MaxPool2x2
from gdd_fast.models.frozen_conv import FrozenConv2d
from gdd_fast.models.unet_block import UNetBlock
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
class AttentionCall:
    """One call of attention, less the batch: `channels` of the output."""

    channels: int
    resolution: int
    num_heads: int


@dataclass(frozen=True)
class ConvCall:
    """One frozen convolution with a ReLU, less the batch: `size` is the weight's."""

    size: tuple[int, int, int, int]
    resolution: int
    stride: int
    padding: int
    groups: int
    activation: str


@dataclass(frozen=True)
class ResidualCall:
    """One call of residual, less the batch."""

    channels: int
    resolution: int


@dataclass(frozen=True)
class PoolCall:
    """One call of max_pool2x2, less the batch."""

    channels: int
    resolution: int


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


@functools.cache
def residual_calls() -> tuple[ResidualCall, ...]:
    """Every distinct call at the end of the generators' blocks, in order of first appearance."""
    found: list[ResidualCall] = []

    def hook(_block: UNetBlock, _inputs: Any, outputs: Any) -> None:
        y = tensors(outputs)[0]  # statistics may follow
        found.append(ResidualCall(y.shape[1], y.shape[2]))

    for name in NETWORKS:
        _run_hooked(build(name), call, lambda m: m.register_forward_hook(hook) if isinstance(m, UNetBlock) else None)
    return tuple(dict.fromkeys(found))


@functools.cache
def attention_calls() -> tuple[AttentionCall, ...]:
    """Every distinct call in the generators, in order of first appearance."""
    found: list[AttentionCall] = []

    def hook(block: UNetBlock, _inputs: Any, outputs: Any) -> None:
        y = tensors(outputs)[0]
        found.append(AttentionCall(y.shape[1], y.shape[2], block.num_heads))

    def attach(module: nn.Module) -> Any:
        attends = isinstance(module, UNetBlock) and module.num_heads
        return module.register_forward_hook(hook) if attends else None

    for name in NETWORKS:
        _run_hooked(build(name), call, attach)
    return tuple(dict.fromkeys(found))


@functools.cache
def backbone_calls() -> tuple[tuple[ConvCall, ...], tuple[PoolCall, ...]]:
    """Every distinct frozen convolution with an activation, and pooling, in the folded backbones."""
    convolutions: list[ConvCall] = []
    pools: list[PoolCall] = []

    def convolution(layer: FrozenConv2d, inputs: tuple[Any, ...]) -> None:
        if len(inputs) > 1 and inputs[1] is not None:
            size, x = tuple(layer.weight.shape), inputs[0]
            geometry = (layer.stride[0], layer.padding[0], layer.groups)
            convolutions.append(ConvCall(size, x.shape[2], *geometry, inputs[1]))

    def pool(_layer: MaxPool2x2, inputs: tuple[Tensor]) -> None:
        pools.append(PoolCall(inputs[0].shape[1], inputs[0].shape[2]))

    def attach(module: nn.Module) -> Any:
        if isinstance(module, FrozenConv2d):
            return module.register_forward_pre_hook(convolution)
        return module.register_forward_pre_hook(pool) if isinstance(module, MaxPool2x2) else None

    for name, resolution in BACKBONES:
        with torch.device("meta"):
            net = fold_batch_norm(build_backbone(name, None, resolution))
        _run_hooked(net, lambda n, r=resolution: n(torch.empty((1, 3, r, r), device="meta")), attach)
    return tuple(dict.fromkeys(convolutions)), tuple(dict.fromkeys(pools))


def _run_hooked(net: nn.Module, run: Callable[[Any], Any], attach: Callable[[nn.Module], Any]) -> None:
    handles = [handle for module in net.modules() if (handle := attach(module)) is not None]
    with torch.no_grad():
        run(net)
    for handle in handles:
        handle.remove()
