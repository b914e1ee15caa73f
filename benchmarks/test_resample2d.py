"""Up- and downsampling by two, against EDM's grouped convolutions and against a copy of the input."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_peers import assert_as_accurate, timed
from gdd_fast.modules import resample_kernel
from gdd_fast.ops.resample2d import resample2d

SMOKE, FULL = (2, 16, 8, 8), (8, 256, 32, 32)
FILTERS = {"box": (1, 1), "1331": (1, 3, 3, 1)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def stock(x: Tensor, kernel: Tensor, up: bool, padding: int) -> Tensor:
    """A depthwise convolution with the filter repeated for every channel, as EDM's networks have it."""
    channels = x.shape[1]
    weight = kernel.to(x.dtype).tile([channels, 1, 1, 1])
    if up:
        return F.conv_transpose2d(x, weight * 4, groups=channels, stride=2, padding=padding)
    return F.conv2d(x, weight, groups=channels, stride=2, padding=padding)


@pytest.mark.parametrize("peer", ["gdd_fast", "stock", "copy of x"])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SMOKE, pytest.param(FULL, marks=pytest.mark.slow)], ids=["smoke", "full"])
@torch.no_grad()
def test_resample2d(benchmark, shape, dtype, memory, taps, up, peer):
    kernel, padding = resample_kernel(FILTERS[taps]), len(FILTERS[taps]) // 2 - 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(DTYPES[dtype]).contiguous(memory_format=FORMATS[memory])
    ours = lambda: resample2d(x, kernel, up=up, padding=padding, box=taps == "box")
    theirs = lambda: stock(x, kernel, up, padding)
    call = {"gdd_fast": ours, "stock": theirs, "copy of x": x.clone}[peer]
    y = theirs()

    def check() -> None:
        exact = stock(x.double(), kernel.double(), up, padding)
        assert_as_accurate([y if peer == "stock" else ours()], [y], [exact])

    moved = (x.numel() + (x if peer == "copy of x" else y).numel()) * x.element_size()
    timed(benchmark, f"resample2d {'up' if up else 'down'} {taps} {dtype} {memory}", call, check, moved=moved)
