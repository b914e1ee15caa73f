"""`python -m benchmarks.counts.saved_bytes`: bytes that a forward pass keeps for backward, PyTorch's layers and ours.

Counted on the CPU in float32 with saved-tensor hooks: every storage once, parameters and buffers left out. The figures
are what a second image adds to the first: what is kept once per batch, such as reordered weights, is no image's. The
generators, without dropout as in GDD, are frozen as in GDD-I (level 1) and run as in a generator step; the backbones
are the frozen halves of the discriminator, with the gradient of their input wanted; timm's and torchvision's networks
likewise, by `gdd_fast.accelerate`, where these libraries are installed. "stock" runs the same networks on plain PyTorch
(as the peers of the benchmarks, the backbones with their batch norms as they come), "gdd_fast" the operators of
`--backend`; on a CPU the fused ones need the compiled extension. What group_norm_silu keeps does not depend on the
backend.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.operator_case import package
from benchmarks.peers.networks import plain
from benchmarks.peers.stock_unet import BEST, StockGenerator
from gdd_fast.acceleration import accelerate
from gdd_fast.distill import memory_forecast
from gdd_fast.distill.freeze import freeze
from gdd_fast.layers.linear import Init
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.edm import adm, ncsnpp
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.teachers.unet2d import UNet2DPrecond

Network = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A row of the table: how its network and a batch of so many inputs are made, plain or ours; target in percent.

    Counted at `batch` and twice as many: accelerated networks fold norms into weights only for large batches.
    """

    name: str
    make: Callable[[bool, int], Network]
    target: int | None = None
    batch: int = 1


def generator(arguments: dict, resolution: int) -> Callable[[bool, int], Network]:
    def make(stock: bool, batch: int) -> Network:
        # what is kept does not depend on the weights, and drawing them takes longer than the rest
        with mock.patch.object(Init, "draw", lambda self, shape, *_: torch.zeros(shape)):
            net = GDDPrecond(resolution, 3, **arguments).train()
        freeze(net, 1)
        net = StockGenerator(net, BEST, torch.float32).train() if stock else net
        net.to(memory_format=torch.channels_last)
        return net, (torch.randn(batch, 3, resolution, resolution), torch.full((batch,), 80.0))

    return make


# google/ddpm-cifar10-32's, of which the rest is UNet2DModel's default
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def diffusers_generator(stock: bool, batch: int) -> Network:
    """The U-Net of google/ddpm-cifar10-32 as diffusers has it, or accelerated."""
    package("diffusers")
    net = UNet2DPrecond(DDPM_CIFAR10, {"kind": "vp"}).train()
    freeze(net, 1)
    net.to(memory_format=torch.channels_last)
    if not stock:
        accelerate(net, report=True)
    return net, (torch.randn(batch, 3, 32, 32), torch.full((batch,), net.sigma_init))


def backbone(name: str, resolution: int) -> Callable[[bool, int], Network]:
    def make(stock: bool, batch: int) -> Network:
        net = build_backbone(name, None, resolution)
        net = (plain(net) if stock else fold_batch_norm(net)).to(memory_format=torch.channels_last)
        return net, (torch.randn(batch, 3, resolution, resolution, requires_grad=True),)

    return make


def accelerated(module: str, name: str) -> Callable[[bool, int], Network]:
    """A network of another library, with random weights, at 224."""

    def make(stock: bool, batch: int) -> Network:
        library = package(module)
        net = library.create_model(name) if module == "timm" else getattr(library, name)()
        net = net.eval().requires_grad_(False)
        return net if stock else accelerate(net), (torch.randn(batch, 3, 224, 224, requires_grad=True),)

    return make


CASES = (
    Case("NCSN++ 32, generator step", generator(ncsnpp(dropout=0.0), 32), target=35),
    Case("ADM 64, generator step", generator(adm(dropout=0.0), 64)),
    Case("DDPM 32 of diffusers, generator step", diffusers_generator, target=40),
    Case("VGG-16 (batch norm) at 224", backbone("vgg16_bn", 224), target=15),
    Case("VGG-16 at 224", backbone("vgg16", 224), target=15),
    Case("EfficientNet-lite0 at 224", backbone("tf_efficientnet_lite0", 224)),
    Case("timm's resnet50, accelerated", accelerated("timm", "resnet50"), batch=8),
    Case("timm's tf_efficientnet_lite0, accelerated", accelerated("timm", "tf_efficientnet_lite0"), batch=8),
    Case("torchvision's vgg16_bn, accelerated", accelerated("torchvision.models", "vgg16_bn"), batch=8),
)


def saved_bytes(net: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., object] | None = None) -> int:
    """Bytes of the distinct storages that `net(*inputs)` keeps for backward, without parameters and buffers.

    `call` stands for `net` where it is called otherwise.
    """
    return memory_forecast.saved_bytes(lambda: (call or net)(*inputs), memory_forecast.own_storages(net))


def measure(case: Case, backend: str = "auto") -> tuple[int, int]:
    """Bytes per image: stock, ours."""
    stock, ours = [], []
    for batch in (case.batch, 2 * case.batch):
        net, inputs = case.make(True, batch)
        stock.append(saved_bytes(net, inputs))
        net, inputs = case.make(False, batch)
        for module in net.modules():
            if hasattr(module, "operator"):
                module.backend = backend if backend in (*module.operator.fused, "auto") else "torch"
        ours.append(saved_bytes(net, inputs))
    return tuple((twice - once) // case.batch for once, twice in (stock, ours))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.saved_bytes", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--backend", default="auto", help="of the fused operators: auto, torch, cpp, triton")
    backend = parser.parse_args().backend
    row = "{:<44}{:>10}{:>10}{:>8}{:>8}".format
    print(row("MB saved for backward per image", "stock", "gdd_fast", "%", "target"))
    for case in CASES:
        try:
            stock, ours = measure(case, backend)
        except UnavailableError as error:
            print(f"{case.name:<44}left out: {error}")
            continue
        target = "" if case.target is None else f"{case.target} %"
        figures = f"{stock / 1e6:.1f}", f"{ours / 1e6:.2f}", f"{100 * ours / stock:.1f}"
        print(row(case.name, *figures, target), flush=True)


if __name__ == "__main__":
    main()
