"""Network images to bytes, against EDM's expression."""

import pytest
import torch

from benchmarks.cpu_peers import timed
from gdd_fast.ops.to_uint8 import to_uint8

SMOKE, FULL = (2, 3, 16, 16), (64, 3, 64, 64)


@pytest.mark.parametrize("peer", ["gdd_fast", "stock"])
@pytest.mark.parametrize("shape", [SMOKE, pytest.param(FULL, marks=pytest.mark.slow)], ids=["smoke", "full"])
def test_to_uint8(benchmark, shape, peer):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stock = lambda: (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    call = stock if peer == "stock" else lambda: to_uint8(x)

    def check() -> None:
        assert torch.equal(call(), stock())

    timed(benchmark, f"to_uint8 {tuple(shape)}", call, check, moved=x.numel() * (x.element_size() + 1))
