"""The engine's operators per forward: at most a quarter of EDM's own and a third of diffusers', on a GPU and a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.counts.dispatched import DIFFUSERS, EDM, of_engine, of_plain
from benchmarks.counts.peak_memory import peak
from gdd_fast.backend import has_extension


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_quarter(name: str, device: str) -> None:
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    count = of_engine(name, device)
    assert 4 * count.total <= EDM[name][0], count.operators
    assert not any("cat" in operator for operator in count.operators), "a concatenation was built"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_third_of_diffusers_own(device: str) -> None:
    """The architecture of google/ddpm-cifar10-32, narrower."""
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    pytest.importorskip("diffusers")
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    stock, folded = of_plain(DIFFUSERS), of_engine(DIFFUSERS, device)
    assert stock.total > 600, "diffusers' forward is counted whole"
    assert 3 * folded.total <= stock.total, folded.operators


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1  # 1 beside x
        z = torch.cat([y, y])  # 3
        del y
        z = z.view(2, -1) * 2  # 4, and 2 once the first z is gone
        return z[:1].clone()  # 3

    assert peak(function, torch.zeros(1000)) == 4 * 4000


# In a process of its own: this one's kernels may be the interpreter's.
_ARITHMETIC = """
import json
import torch
from benchmarks.counts.arithmetic import arithmetic
from benchmarks.counts.dispatched import build, inputs
from benchmarks.counts.flops import count_flops
from benchmarks.counts.plain import plain_pytorch

net = build("ncsnpp-32", 32).to("meta")
z, _ = inputs(net, "meta", 1)
with torch.no_grad(), plain_pytorch(net):
    plain = count_flops(lambda: net(z, torch.empty(1, device="meta")))
counted = {}
for batch, kinds in arithmetic("ncsnpp-32", (1, 64), 32).items():
    kernels = [kernel for kernels in kinds.values() for kernel in kernels]
    counted[batch] = {"flop": sum(k.flop for k in kernels), "kernels": len(kernels), "norms": len(kinds["norms"])}
print(json.dumps([plain, counted]))
"""


def test_the_arithmetic_counts_what_the_plain_network_computes() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _ARITHMETIC],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, counted = json.loads(done.stdout)
    one, many = counted["1"], counted["64"]
    assert many["flop"] == 64 * one["flop"]
    assert 0.98 * plain < one["flop"] < plain, "projections before doubling the resolution, and no embedding"
    assert one["kernels"] - one["norms"] == many["kernels"] - many["norms"]
    assert one["norms"] >= many["norms"] >= 73
