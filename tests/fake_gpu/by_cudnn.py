"""Run by tests/distill/test_fake_gpu.py in a process that has the fake GPU: frozen_conv2d_relu leaves to cuDNN's one
operation what tuned.json lists for the architecture, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gdd_fast.kernels import _launch
from gdd_fast.ops import frozen_conv2d_relu as frozen_conv2d_relu_operator
from gdd_fast.ops.frozen_conv2d_relu import frozen_conv2d_relu

GPU = torch.device("cuda", 0)
LISTED = [8, 16, 3, 1, 14, "bfloat16"]


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The geometry of each call of cuDNN's operation, on a GPU for which one shape is listed."""
    calls = []

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> Tensor:
        calls.append(geometry)
        return F.relu(F.conv2d(x, weight, bias, *geometry))

    table = _launch.table() | {"frozen_conv2d_relu": {"faster_by_cudnn": {"sm_90": [LISTED]}}}
    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_launch, "table", lambda: table)
    frozen_conv2d_relu_operator._faster_by_cudnn.cache_clear()
    with FakeTensorMode():
        yield calls
    frozen_conv2d_relu_operator._faster_by_cudnn.cache_clear()


def called(side: int = 14, dtype: torch.dtype = torch.bfloat16, recorded: bool = False, **options) -> Tensor:
    x = torch.empty(2, 8, side, side, dtype=dtype, device=GPU).to(memory_format=torch.channels_last)
    weight = torch.empty(16, 8, 3, 3, dtype=dtype, device=GPU).to(memory_format=torch.channels_last)
    bias = torch.empty(16, dtype=dtype, device=GPU)
    return frozen_conv2d_relu(x.requires_grad_(recorded), weight, bias, **{"padding": 1, **options})


def test_what_is_listed(measured):
    y = called()
    assert measured == [((1, 1), (1, 1), (1, 1), 1)]
    assert y.shape == (2, 16, 14, 14) and y.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        called(recorded=True)
    assert len(measured) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"side": 28},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"recorded": True},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"activation": "relu6"},
        {"backend": "triton"},
        {"backend": "torch"},
    ],
    ids=str,
)
def test_nothing_else(measured, other):
    called(**other)
    assert measured == []


def test_not_where_algorithms_have_to_be_deterministic(measured, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    called()
    assert measured == []


def test_not_on_another_architecture(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    frozen_conv2d_relu_operator._faster_by_cudnn.cache_clear()
    called()
    assert measured == []
