"""What the U-Net blocks of different projects have in common, computed with their own layers.

A backend of None means plain PyTorch, as the block itself would compute.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.layers.silent import silent
from gdd_fast.ops.group_norm_silu import group_norm_silu
from gdd_fast.ops.residual import residual


def normalise(
    norm: nn.Module,
    x: Tensor,
    backend: Backend | None,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> Tensor:
    """`group_norm_silu` with the parameters of the group norm `norm`, not called. `add`, `scale`, `shift`: (N, C)."""
    groups, weight, bias, eps = norm.num_groups, norm.weight, norm.bias, norm.eps
    if backend is not None:
        options = {"add": add, "scale": scale, "shift": shift, "activation": activation, "backend": backend}
        return group_norm_silu(x, groups, weight, bias, eps, **options)
    if add is not None:
        x = x + add[:, :, None, None].to(x.dtype)
    x = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        x = x * (scale[:, :, None, None] + 1).to(x.dtype) + shift[:, :, None, None].to(x.dtype)
    return F.silu(x) if activation == "silu" else x


def scaled_sum(x: Tensor, skip: Tensor, scale: float, backend: Backend | None) -> Tensor:
    """`(x + skip) * scale`."""
    if backend is None or x.dtype != skip.dtype:  # dtypes may differ under autocast
        x = x + skip
        return x if scale == 1 else x * scale
    return residual(x, skip, scale=scale, backend=backend)


def unchanged(block: nn.Module, children: Mapping[str, type[nn.Module]]) -> bool:
    """Whether these children of `block`, which its fast forward does not call, kept their class and are `silent`."""
    modules = block._modules
    return all(type(modules.get(name)) is kind and silent(modules[name]) for name, kind in children.items())


def kinds(block: nn.Module, *names: str) -> dict[str, type[nn.Module]]:
    """The classes of those of these children that `block` has, for `unchanged`."""
    return {name: type(child) for name in names if (child := block._modules.get(name)) is not None}
