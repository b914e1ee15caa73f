"""The layers of the real networks: what each operator is called with, collected from the networks themselves.

The networks run on the meta device, where nothing is computed and no memory is taken; module hooks see every call.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.layers.group_norm import GroupNorm
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


@dataclass(frozen=True)
class MapCall:
    """One call of an operator on a square map (residual, max_pool2x2, to_uint8), less the batch."""

    channels: int
    resolution: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.resolution}²"


@dataclass(frozen=True)
class AttentionCall(MapCall):
    """One call of attention, less the batch; `channels` of the values."""

    heads: int

    def __str__(self) -> str:
        return f"{super().__str__()} heads {self.heads}"


@dataclass(frozen=True)
class ReluCall(MapCall):
    """One call of relu_bits (in frozen_conv2d_relu), less the batch: its result, and where it is cut off."""

    ceiling: float

    def __str__(self) -> str:
        return f"{super().__str__()} ceiling {self.ceiling}"


@dataclass(frozen=True)
class Layers:
    """Calls by operator, each once, in order of first appearance."""

    norms: tuple[NormCall, ...] = ()
    residuals: tuple[MapCall, ...] = ()
    attentions: tuple[AttentionCall, ...] = ()
    relus: tuple[ReluCall, ...] = ()
    pools: tuple[MapCall, ...] = ()
    images: tuple[MapCall, ...] = ()

    def __add__(self, other: "Layers") -> "Layers":
        names = (field.name for field in fields(self))
        return Layers(*(tuple(dict.fromkeys(getattr(self, n) + getattr(other, n))) for n in names))


def build(name: str, dtype: torch.dtype = torch.float32) -> GDDPrecond:
    """A network of NETWORKS on the meta device."""
    resolution, arguments = NETWORKS[name]
    with torch.device("meta"):
        return GDDPrecond(resolution, 3, dtype=dtype, **arguments)


def call(net: GDDPrecond, batch: int = 1) -> Tensor:
    """The network's output for a batch of noise, on the device of its parameters."""
    device = next(net.parameters()).device
    x = torch.empty((batch, net.img_channels, net.img_resolution, net.img_resolution), device=device)
    labels = torch.empty((batch, net.label_dim), device=device) if net.label_dim else None
    return net(x, torch.full((batch,), 80.0, device=device), labels)


def collect_generator(name: str) -> Layers:
    """Every call of our operators in one forward pass of a network of NETWORKS."""
    net = build(name)
    norms, residuals, attentions = [], [], []

    def norm(module: GroupNorm, args: tuple, kwargs: dict, _: Tensor) -> None:
        maps = args[0] if isinstance(args[0], tuple) else args[:1]
        given = [kwargs.get(key) is not None for key in ("add", "scale")]
        silu = kwargs.get("activation", "silu") == "silu"
        norms.append(NormCall(tuple(x.shape[1] for x in maps), maps[0].shape[2], module.num_groups, *given, silu))

    def block(module: UNetBlock, _args: tuple, _kwargs: dict, result: Tensor | tuple[Tensor, Tensor | None]) -> None:
        y = result[0] if isinstance(result, tuple) else result
        residuals.append(MapCall(y.shape[1], y.shape[2]))
        if module.num_heads:
            attentions.append(AttentionCall(y.shape[1], y.shape[2], module.num_heads))

    # the meta device has no fused operators, whose presence moves the convolutions' biases into them, and statistics
    with mock.patch.object(GroupNorm, "is_fused", lambda *_: True):
        images = _run(net, {GroupNorm: norm, UNetBlock: block}, functools.partial(call, net))
    return Layers(norms, residuals, attentions, images=[MapCall(*images.shape[1:3])])


def collect_backbone(name: str) -> Layers:
    """Every call of our operators in one forward pass of a frozen backbone at 224 pixels, batch norm folded."""
    with torch.device("meta"):
        net = fold_batch_norm(build_backbone(name, None, 224))
    relus, pools = [], []

    def convolution(_: FrozenConv2d, args: tuple, _kwargs: dict, y: Tensor) -> None:
        if len(args) > 1 and args[1] is not None:
            relus.append(ReluCall(y.shape[1], y.shape[2], math.inf if args[1] == "relu" else 6.0))

    def pool(_: MaxPool2x2, args: tuple, _kwargs: dict, _y: Tensor) -> None:
        pools.append(MapCall(args[0].shape[1], args[0].shape[2]))

    x = torch.empty((1, 3, 224, 224), device="meta")
    _run(net, {FrozenConv2d: convolution, MaxPool2x2: pool}, functools.partial(net, x))
    return Layers(relus=relus, pools=pools)


def _run(net: nn.Module, hooks: dict[type[nn.Module], Callable[..., None]], run: Callable[[], Tensor]) -> Tensor:
    """run() with a forward hook on every module of these types."""
    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in net.modules()
        for kind, hook in hooks.items()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        y = run()
    for handle in handles:
        handle.remove()
    return y


@functools.cache
def layers() -> Layers:
    """Those of all networks and backbones."""
    collected = [*map(collect_generator, NETWORKS), *map(collect_backbone, BACKBONES)]
    return sum((Layers(*(tuple(getattr(c, f.name)) for f in fields(c))) for c in collected), Layers())


def norm_calls() -> tuple[NormCall, ...]:
    """Every distinct call of group_norm_silu in the networks, in order of first appearance."""
    return layers().norms


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

    for name in BACKBONES:
        with torch.device("meta"):
            net = fold_batch_norm(build_backbone(name, None))
        _run_hooked(net, lambda n: n(torch.empty((1, 3, 224, 224), device="meta")), attach)
    return tuple(dict.fromkeys(convolutions))


def _run_hooked(net: nn.Module, run: Callable[[Any], Any], attach: Callable[[nn.Module], Any]) -> None:
    handles = [handle for module in net.modules() if (handle := attach(module)) is not None]
    with torch.no_grad():
        run(net)
    for handle in handles:
        handle.remove()
