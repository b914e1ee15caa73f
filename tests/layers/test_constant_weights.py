"""Layers with constant weights keep nothing that was computed from them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.layers.self_attention import QkvConv2d


@pytest.mark.parametrize("layer", [lambda: FrozenConv2d(4, 8, 3), lambda: QkvConv2d(4, 1).requires_grad_(False)])
def test_layers_of_ours_keep_nothing(layer: Callable[[], nn.Module]) -> None:
    layer = layer()
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    before = copy.copy(layer.__dict__)
    if layer.bias.requires_grad is False:
        layer.bias.data = layer.bias.data.bfloat16()
    y = layer(x)
    assert layer.__dict__.keys() == before.keys()
    layer.weight.data.mul_(2)
    layer.bias.data.mul_(2)
    torch.testing.assert_close(layer(x), 2 * y)
