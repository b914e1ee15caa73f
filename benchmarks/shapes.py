"""The layers of the real networks: what each operator is called with, collected from the networks themselves.

The networks run on the meta device, where nothing is computed and no memory is taken; module hooks see every call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdd_fast.models.edm import adm, ncsnpp
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.modules import GroupNorm

# (resolution, arguments) of the generators of METHOD's recipes.
NETWORKS = {
    "ncsnpp-32": (32, ncsnpp()),
    "ncsnpp-64": (64, ncsnpp(channel_mult=[1, 2, 2, 2])),
    "adm-64": (64, {**adm(), "label_dim": 1000}),
}


@dataclass(frozen=True)
class NormCall:
    """One call of group_norm_silu, less the batch: `channels` of x, or of x and skip; which of the rest are given."""

    channels: tuple[int, ...]
    resolution: int
    num_groups: int
    add: bool
    scale: bool
    silu: bool


@dataclass(frozen=True)
class ResidualCall:
    """One call of residual, less the batch."""

    channels: int
    resolution: int


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


def collect(name: str) -> tuple[list[NormCall], list[ResidualCall]]:
    """Every call of the two operators in one forward pass of a network, in order, with repetitions."""
    net = build(name)
    norms: list[NormCall] = []
    residuals: list[ResidualCall] = []

    def norm(module: GroupNorm, args: tuple, kwargs: dict) -> None:
        maps = args[0] if isinstance(args[0], tuple) else args[:1]
        channels = tuple(x.shape[1] for x in maps)
        given = [kwargs.get(key) is not None for key in ("add", "scale")]
        silu = kwargs.get("activation", "silu") == "silu"
        norms.append(NormCall(channels, maps[0].shape[2], module.num_groups, *given, silu))

    def block(module: UNetBlock, _args: tuple, y: Tensor) -> None:
        residuals.extend([ResidualCall(y.shape[1], y.shape[2])] * (2 if module.num_heads else 1))

    handles = [handle for module in net.modules() for handle in _hook(module, norm, block)]
    with torch.no_grad():
        call(net)
    for handle in handles:
        handle.remove()
    return norms, residuals


def _hook(module: nn.Module, norm, block) -> Iterator:
    if isinstance(module, GroupNorm):
        yield module.register_forward_pre_hook(norm, with_kwargs=True)
    elif isinstance(module, UNetBlock):
        yield module.register_forward_hook(block)


def norm_calls() -> list[NormCall]:
    """Every distinct call of group_norm_silu in the networks, in order of first appearance."""
    return list(dict.fromkeys(shape for name in NETWORKS for shape in collect(name)[0]))


def residual_calls() -> list[ResidualCall]:
    """Every distinct call of residual in the networks' blocks, in order of first appearance."""
    return list(dict.fromkeys(shape for name in NETWORKS for shape in collect(name)[1]))
