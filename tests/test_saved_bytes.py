"""The table of bytes saved for backward: what is counted, and the frozen backbones' share of PyTorch's."""

import pytest
import torch
from torch import nn

from benchmarks.saved_bytes import CASES, measure, plain_pytorch, saved_bytes
from gdd_fast.backend import obstacle
from gdd_fast.models.frozen_conv import FrozenConv2d
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


@pytest.mark.parametrize("case", [case for case in CASES if "VGG" in case.name], ids=lambda case: case.name)
def test_frozen_backbones_meet_the_target(case):
    reason = obstacle(OPERATOR, "cpp", "cpu")
    if reason is not None:
        pytest.skip(reason)
    stock, ours = measure(case, "cpp")
    assert ours <= case.target / 100 * stock
