"""The table of bytes saved for backward: what is counted, and our share of what PyTorch keeps."""

import pytest
import torch
from plain_network import plain_pytorch
from torch import nn

from benchmarks.counts.saved_bytes import CASES, measure, saved_bytes
from gdd_fast.backend import obstacle
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.layers.linear import Init
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ops.frozen_conv2d_relu import OPERATOR


def test_counts_each_storage_once_and_no_parameters():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1))
    x = torch.zeros(1, 2, 5, 5, requires_grad=True)
    assert saved_bytes(net, (x,)) == 4 * 25 * (2 + 4)  # both inputs; the second is the activation's result as well
    with torch.no_grad():
        assert saved_bytes(net, (x,)) == 0


def test_stock_keeps_what_pytorch_keeps():
    net, x = FrozenConv2d(2, 4, 1), torch.zeros(1, 2, 5, 5, requires_grad=True)
    assert saved_bytes(net, (x,)) == 0
    with plain_pytorch(net):
        assert saved_bytes(net, (x,)) == 4 * 25 * 2


def test_stock_builds_the_concatenation_and_keeps_every_step_of_a_norm():
    block = UNetBlock(64, 32, 4, init=Init(), init_zero=Init()).requires_grad_(False)
    x = torch.zeros(1, 32, 8, 8, requires_grad=True)
    pair, emb = (x, torch.zeros(1, 32, 8, 8)), torch.zeros(1, 4)
    width = 4 * 64 * 32  # bytes of 32 channels
    ours = saved_bytes(block, (pair, emb))
    assert 3 * width <= ours < 3.5 * width  # the pair and conv0's result
    with plain_pytorch(block):
        # the pair as one, its norm, conv0's input; conv0's result, the second norm scaled and shifted, conv1's input
        assert saved_bytes(block, (pair, emb)) >= (2 + 2 + 2 + 1 + 1 + 1) * width


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if "ADM" in case.name else (), id=case.name)
        for case in CASES
        if "generator" in case.name
    ],
)
def test_generators_meet_the_target(case):
    if "diffusers" in case.name:
        pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    stock, ours = measure(case)
    assert ours <= (case.target or 40) / 100 * stock


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if "norm" in case.name else pytest.mark.slow, id=case.name)
        for case in CASES
        if "VGG" in case.name
    ],
)
def test_frozen_backbones_meet_the_target(case):
    reason = obstacle(OPERATOR, "cpp", "cpu")
    if reason is not None:
        pytest.skip(reason)
    stock, ours = measure(case, "cpp")
    assert ours <= case.target / 100 * stock
