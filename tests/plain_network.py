"""Networks of gdd_fast on plain PyTorch: every operator replaced by its definition, every concatenation built."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers import convolution, frozen_conv, self_attention
from gdd_fast.layers.skip_pair import Pair
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ops import group_norm_silu, residual
from gdd_fast.ops.attention import attention_ref
from gdd_fast.ops.resample2d import resample2d_ref


@contextlib.contextmanager
def plain_pytorch(net: nn.Module) -> Iterator[None]:
    """`net`, called in this block, runs definitions, each of which the dispatcher sees. Its backends stay torch.

    Convolutions keep their input for backward, as PyTorch's do, and ReLUs run in place, as torchvision and timm have
    them.
    """
    for module in net.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"

    def conv2d(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry, backend: str = "", **options
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, *geometry, **options)

    def conv2d_relu(*arguments, activation: str, backend: str) -> Tensor:
        y = conv2d(*arguments)
        return F.relu_(y) if activation == "relu" else F.relu6(y, inplace=True)

    def block(module: UNetBlock, x: Tensor | Pair, emb: Tensor, **options) -> Tensor:
        return fused_block(module, torch.cat(x, 1) if isinstance(x, tuple) else x, emb, **options)

    fused_block = UNetBlock.forward
    with (
        mock.patch.object(group_norm_silu, "group_norm_silu", _alone(group_norm_silu.group_norm_silu_ref)),
        mock.patch.object(residual, "residual", _alone(residual.residual_ref)),
        mock.patch.object(convolution, "resample2d", _alone(resample2d_ref)),
        mock.patch.object(self_attention, "attention", lambda qkv, heads, order, _: attention_ref(qkv, heads, order)),
        mock.patch.object(convolution, "frozen_conv2d", conv2d),
        mock.patch.object(self_attention, "frozen_conv2d", conv2d),
        mock.patch.object(frozen_conv, "frozen_conv2d", conv2d),
        mock.patch.object(frozen_conv, "frozen_conv2d_relu", conv2d_relu),
        mock.patch.object(UNetBlock, "forward", block),
    ):
        yield


def _alone(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A definition called as its operator is, with a backend and statistics that it has no use for."""

    def call(*arguments: Any, backend: str, statistics: Any = None, **options: Any) -> Tensor:
        return definition(*arguments, **options)

    return call
