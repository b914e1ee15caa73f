"""The layers of the real networks: what each operator is called with, collected from the networks themselves.

The networks run on the meta device, where nothing is computed and no memory is taken; module hooks see every call.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.models import unet_block
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.backbones.vgg import MaxPool2x2
from gdd_fast.models.edm import adm, ncsnpp
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.unet_block import UNetBlock

# (resolution, arguments) of the generators of the paper's recipes.
NETWORKS = {
    "ncsnpp-32": (32, ncsnpp()),
    "ncsnpp-64": (64, ncsnpp(channel_mult=[1, 2, 2, 2])),
    "adm-64": (64, {**adm(), "label_dim": 1000}),
}
BACKBONES = ("vgg16_bn", "tf_efficientnet_lite0")


@dataclass(frozen=True)
class MapCall:
    """One call of an operator on a square map (residual, max_pool2x2), less the batch.

    `str` names it in docs/kernels_table.md, `title` in the record.
    """

    channels: int
    resolution: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.resolution}²"

    @property
    def title(self) -> str:
        return str(self)

    @property
    def elements(self) -> int:
        """Elements of the input for one image."""
        return self.channels * self.resolution**2


@dataclass(frozen=True)
class AttentionCall(MapCall):
    """One call of attention, less the batch; `channels` of the values."""

    heads: int

    def __str__(self) -> str:
        return f"{super().__str__()} heads {self.heads}"

    @property
    def title(self) -> str:
        return f"{super().__str__()} {self.heads} heads"


@dataclass(frozen=True)
class ReluCall(MapCall):
    """One call of relu_bits (in frozen_conv2d_relu), less the batch: its result, and where it is cut off."""

    ceiling: float

    def __str__(self) -> str:
        return f"{super().__str__()} ceiling {self.ceiling}"


@dataclass(frozen=True)
class ResampleCall(MapCall):
    """One call of resample2d, less the batch: its input, the filter's taps, and its padding."""

    up: bool
    taps: tuple[float, ...]
    padding: int

    def __str__(self) -> str:
        return f"{super().__str__()} {'up' if self.up else 'down'} {len(self.taps)} taps"


@dataclass(frozen=True)
class ConvCall(MapCall):
    """One frozen convolution with an activation, less the batch: its input; `size` is the weight's."""

    size: tuple[int, int, int, int]
    stride: int
    padding: int
    groups: int
    activation: str

    def __str__(self) -> str:
        kind = "x".join(map(str, self.size)) + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{super().__str__()} {'depthwise ' if self.groups > 1 else ''}{kind}"

    @property
    def output_side(self) -> int:
        return (self.resolution + 2 * self.padding - self.size[2]) // self.stride + 1


@dataclass(frozen=True)
class NormCall:
    """One call of group_norm_silu, less the batch: `channels` of x, or of x and skip; which of the rest are given."""

    channels: tuple[int, ...]
    resolution: int
    num_groups: int
    add: bool
    scale: bool
    silu: bool

    def __str__(self) -> str:
        extras = [name for name in ("add", "scale", "silu") if getattr(self, name)]
        return " ".join(("+".join(map(str, self.channels)) + f"x{self.resolution}²", *extras))

    @property
    def title(self) -> str:
        return str(self).removesuffix(" silu") if self.silu else f"{self} no silu"

    @property
    def elements(self) -> int:
        return sum(self.channels) * self.resolution**2


@dataclass(frozen=True)
class Layers:
    """Calls by operator, each once, in order of first appearance."""

    norms: tuple[NormCall, ...] = ()
    residuals: tuple[MapCall, ...] = ()
    resamples: tuple[ResampleCall, ...] = ()
    attentions: tuple[AttentionCall, ...] = ()
    convolutions: tuple[ConvCall, ...] = ()
    relus: tuple[ReluCall, ...] = ()
    pools: tuple[MapCall, ...] = ()


@functools.cache
def layers() -> Layers:
    """Every call of our operators in one forward pass of the generators and of the backbones.

    The backbones take 224 pixels and have their batch norms folded.
    """
    found: defaultdict[str, list[Any]] = defaultdict(list)
    with (
        torch.device("meta"),
        torch.no_grad(),
        # fused operators, which the meta device has none of, take the convolutions' biases and statistics along
        mock.patch.object(GroupNorm, "is_fused", lambda *_: True),
        # but not from a convolution that has a hook
        mock.patch.object(unet_block, "silent", lambda _: True),
    ):
        for name in NETWORKS:
            net = build(name)
            _watch(net, found)
            call(net)
        for name in BACKBONES:
            net = fold_batch_norm(build_backbone(name, None, 224))
            _watch(net, found)
            net(torch.empty(1, 3, 224, 224))
    return Layers(**{name: tuple(dict.fromkeys(calls)) for name, calls in found.items()})


def _watch(net: nn.Module, found: dict[str, list[Any]]) -> None:
    """From now on the layers of `net` note in `found` what they are called with."""

    def norm(module: GroupNorm, args: tuple, kwargs: dict, _: Tensor) -> None:
        maps = args[0] if isinstance(args[0], tuple) else args[:1]
        given = [kwargs.get(key) is not None for key in ("add", "scale")]
        silu = kwargs.get("activation", "silu") == "silu"
        channels = tuple(x.shape[1] for x in maps)
        found["norms"].append(NormCall(channels, maps[0].shape[2], module.num_groups, *given, silu))

    def block(module: UNetBlock, _args: tuple, _kwargs: dict, result: Tensor | tuple[Tensor, Tensor | None]) -> None:
        y = result[0] if isinstance(result, tuple) else result
        found["residuals"].append(MapCall(y.shape[1], y.shape[2]))
        if module.num_heads:
            found["attentions"].append(AttentionCall(y.shape[1], y.shape[2], module.num_heads))

    def resample(layer: Conv2d, args: tuple, _kwargs: dict, _: Tensor) -> None:
        if not (layer.up or layer.down):
            return
        channels, resolution, padding = args[0].shape[1], args[0].shape[2], layer.border
        if layer.conv_first:  # the filter comes after the convolution, which has added its border
            channels, resolution, padding = layer.out_channels, resolution + 2 * layer.border, 0
        found["resamples"].append(ResampleCall(channels, resolution, layer.up, layer.taps, padding))

    def convolution(layer: FrozenConv2d, args: tuple, _kwargs: dict, y: Tensor) -> None:
        x, activation = (*args, None)[:2]
        if activation is not None:
            geometry = (tuple(layer.weight.shape), layer.stride[0], layer.padding[0], layer.groups, activation)
            found["convolutions"].append(ConvCall(x.shape[1], x.shape[2], *geometry))
            found["relus"].append(ReluCall(y.shape[1], y.shape[2], math.inf if activation == "relu" else 6.0))

    def pool(_: MaxPool2x2, args: tuple, _kwargs: dict, _y: Tensor) -> None:
        found["pools"].append(MapCall(args[0].shape[1], args[0].shape[2]))

    hooks: dict[type[nn.Module], Callable[..., None]] = {
        GroupNorm: norm, UNetBlock: block, Conv2d: resample, FrozenConv2d: convolution, MaxPool2x2: pool
    }  # fmt: skip
    for module in net.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook, with_kwargs=True)


def build(name: str) -> GDDPrecond:
    """A network of NETWORKS on the meta device."""
    resolution, arguments = NETWORKS[name]
    with torch.device("meta"):
        return GDDPrecond(resolution, 3, **arguments)


def call(net: GDDPrecond, batch: int = 1) -> Tensor:
    """The network's output for a batch of noise, on the device of its parameters."""
    device = next(net.parameters()).device
    x = torch.empty((batch, net.img_channels, net.img_resolution, net.img_resolution), device=device)
    labels = torch.empty((batch, net.label_dim), device=device) if net.label_dim else None
    return net(x, torch.full((batch,), 80.0, device=device), labels)
