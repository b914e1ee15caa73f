"""`pytest benchmarks/test_one_step.py --benchmark-only`: images by the engine against what a user would run instead.

The network is NCSN++ 32 with random weights; `GDD_FAST_NETWORK` and `GDD_FAST_BATCH` choose another of
benchmarks/shapes.py and another batch. Peers are the same network in plain PyTorch operators: float32; bfloat16;
bfloat16, channels_last and compiled. Before the engine is timed, its images are compared with plain float32 ones: the
largest difference in levels of a byte is at most twice that of the plain network in the same compute type, and two.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.dispatched import build, plain_pytorch
from benchmarks.shapes import NETWORKS
from gdd_fast.inference.fold import SIGMA
from gdd_fast.inference.one_step import OneStepGenerator
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ops.to_uint8 import to_uint8_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def network() -> GDDPrecond:
    """With weights that all matter: EDM's own start many layers at zero."""
    name = os.environ.get("GDD_FAST_NETWORK", "ncsnpp-32")
    torch.manual_seed(0)
    net = build(name, NETWORKS[name][1]["model_channels"])
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_uniform_(parameter, a=3**0.5)
        else:
            parameter.add_(torch.randn_like(parameter) / 20)
    return net.to(DEVICE)


@pytest.fixture(scope="module")
def latents(network: GDDPrecond) -> Tensor:
    batch = int(os.environ.get("GDD_FAST_BATCH", "4"))
    return torch.randn(batch, 3, network.img_resolution, network.img_resolution, device=DEVICE)


@pytest.fixture(scope="module")
def labels(network: GDDPrecond, latents: Tensor) -> Tensor | None:
    return torch.eye(network.label_dim, device=DEVICE)[: len(latents)] if network.label_dim else None


@pytest.fixture(scope="module")
def reference(network: GDDPrecond, latents: Tensor, labels: Tensor | None) -> dict[torch.dtype, Tensor]:
    """Plain images, float32, by compute type."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        network.dtype = dtype
        with torch.no_grad(), plain_pytorch():
            found[dtype] = network(latents * SIGMA, torch.tensor(SIGMA, device=DEVICE), labels)
    return found


def stock(network: GDDPrecond, latents: Tensor, labels: Tensor | None, name: str) -> Callable[[], Tensor]:
    """The plain network as `name` has it, to be called within `plain_pytorch`."""
    network.dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
    channels_last = "channels_last" in name
    network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x, sigma = latents * SIGMA, torch.tensor(SIGMA, device=DEVICE)
    call: Callable[..., Tensor] = network
    if "compiled" in name:
        torch._dynamo.reset()
        call = torch.compile(network)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return lambda: to_uint8_ref(call(x, sigma, labels))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def timed(benchmark, function: Callable[[], Tensor], images: int) -> None:
    def synchronised() -> Tensor:
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = "one step"
    benchmark.extra_info["batch"] = images
    benchmark.pedantic(synchronised, warmup_rounds=1, rounds=5, iterations=1)
    if benchmark.stats is not None:  # with --benchmark-disable nothing is timed
        benchmark.extra_info["images/s"] = images / benchmark.stats.stats.min


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_engine(benchmark, network, latents, labels, reference, dtype) -> None:
    network.dtype = torch.float32
    generator = OneStepGenerator.from_network(network, dtype=dtype)
    images = generator.run(latents, labels)
    plain, full = to_uint8_ref(reference[dtype]).int(), to_uint8_ref(reference[torch.float32]).int()
    allowed = 2 * (plain - full).abs().max().item() + 2
    assert (to_uint8_ref(images).int() - full).abs().max() <= allowed
    timed(benchmark, lambda: to_uint8_ref(generator.run(latents, labels)), len(latents))


@pytest.mark.parametrize(
    "name",
    ["float32", "bfloat16", "channels_last bfloat16", "compiled float32", "compiled channels_last bfloat16"],
)
def test_stock(benchmark, network, latents, labels, name) -> None:
    if benchmark.disabled and "compiled" in name:
        pytest.skip("compiling takes a minute, and here nothing is timed")
    with plain_pytorch():
        timed(benchmark, stock(network, latents, labels, name), len(latents))
