"""Folded networks on a CPU: once packed, no weight is brought to another order by a call."""

import os
import subprocess
import sys

import pytest
import torch
from edm_reference import SMALL, fill

from gdd_fast.engine.fold import fold, make_target
from gdd_fast.engine.folded_layers import Convolution
from gdd_fast.models.precond import GDDPrecond

CPU = torch.device("cpu")
NEEDS_PACKING = pytest.mark.skipif(
    make_target(CPU, torch.float32).convolve != "packed", reason="this processor convolves without packed weights"
)
CONVOLUTIONS = """
import sys, torch
from gdd_fast.engine.fold import make_target
from gdd_fast.engine.folded_layers import Convolution
threads, pad = int(sys.argv[1]), {3: 1, 1: 0}
torch.set_num_threads(threads)
target = make_target(torch.device("cpu"), torch.float32)
shapes = [(128, 32, 3), (256, 32, 3), (256, 16, 3), (512, 16, 3), (256, 8, 3), (512, 8, 1)]
layers = [(Convolution(torch.randn(256, c, k, k), torch.zeros(256), pad[k], target), c, size) for c, size, k in shapes]
downs = {size: Convolution(torch.randn(256, 512, 1, 1), None, 0, target) for size in (8, 16)}
with torch.no_grad():
    for call in range(2):
        print("call", call, flush=True)
        for layer, channels, size in layers:
            x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
            y = layer(x)
            if channels == 512:
                downs[size].add_to(y, x)
"""


@NEEDS_PACKING
@pytest.mark.parametrize("processor", ["AVX2", "DEFAULT"])
def test_a_second_call_reorders_no_weight(processor: str) -> None:
    """By oneDNN's own log. Weights packed for no shape in particular took it 74 reorders a network, AVX2, 2 threads."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": processor, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", CONVOLUTIONS, "2"]
    log = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    second = log.partition("call 1")[2].splitlines()
    convolutions = [line for line in second if ",exec,cpu,convolution," in line]
    assert len(convolutions) == 8
    assert [line for line in second if ",exec,cpu,reorder," in line] == []


@NEEDS_PACKING
def test_a_weight_is_packed_once_a_shape() -> None:
    layer = Convolution(torch.randn(4, 3, 3, 3), torch.randn(4), 1, make_target(CPU, torch.float32))
    packed = layer.packed
    shapes = [torch.Size((n, 3, size, size)) for n, size in ((1, 8), (1, 8), (2, 8), (1, 16))]
    weights = [packed(layer.weight, 1, shape) for shape in shapes]
    assert weights[0] is weights[1]
    assert len({id(weight) for weight in weights}) == 3


def test_images_do_not_depend_on_the_batches_before() -> None:
    torch.manual_seed(0)
    net = fill(GDDPrecond(8, 3, **SMALL["ncsnpp"])).requires_grad_(False)
    unet, _ = fold(net, make_target(CPU, torch.float32))
    z = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        first = unet(z, None)
        for part in (z[:1], z[:2], z):
            torch.testing.assert_close(unet(part, None), first[: len(part)], rtol=1e-5, atol=1e-4)
