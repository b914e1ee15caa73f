"""`python -m benchmarks.counts.accelerated`: what `gdd_fast.accelerate` saves in other people's networks, on this CPU.

    saved       bytes that an image's forward pass keeps for backward, with everything frozen and the gradient of the
                input wanted, as `benchmarks.counts.saved_bytes` counts them: an eighth of those of sixteen images less
                those of eight
    copies      bytes that it keeps whatever the batch: folded and converted weights, for the one backward pass
    dispatched  operators that one forward pass without gradients dispatches

Needs timm, torchvision and diffusers; a network whose library is missing is left out, and said to be.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.counts.dispatched import count
from benchmarks.counts.saved_bytes import saved_bytes
from gdd_fast import accelerate

Network = tuple[nn.Module, Callable[[Tensor], Tensor], int]
"""A frozen network, how it is called with a batch of images, and their resolution."""

# google/ddpm-cifar10-32
DDPM_CIFAR10 = {
    "sample_size": 32,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}


BATCH = 8  # images at which most norms of these networks are folded


def from_timm(name: str) -> Network:
    net = importlib.import_module("timm").create_model(name)
    return net, net, 224


def from_torchvision(name: str) -> Network:
    net = importlib.import_module("torchvision").models.get_model(name)
    net = net.features if hasattr(net, "features") else net
    return net, net, 224


def ddpm() -> Network:
    net = importlib.import_module("diffusers").UNet2DModel(**DDPM_CIFAR10)
    return net, lambda x: net(x, 10).sample, 32


CASES: dict[str, Callable[[], Network]] = {
    "resnet50 (timm)": lambda: from_timm("resnet50"),
    "resnet50 (torchvision)": lambda: from_torchvision("resnet50"),
    "vgg16_bn (torchvision)": lambda: from_torchvision("vgg16_bn"),
    "tf_efficientnet_lite0 (timm)": lambda: from_timm("tf_efficientnet_lite0"),
    "ddpm-cifar10-32 (diffusers)": ddpm,
}


def measure(net: nn.Module, call: Callable[[Tensor], Tensor], resolution: int) -> tuple[int, int, int]:
    """Saved bytes per image, bytes of copies, operators dispatched."""
    x = torch.randn(2 * BATCH, 3, resolution, resolution, requires_grad=True)
    once, twice = (_kept(net, call, x[:n].detach().requires_grad_()) for n in (BATCH, 2 * BATCH))
    return (twice - once) // BATCH, max(2 * once - twice, 0), count(call, x[:BATCH].detach()).total


def _kept(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    return saved_bytes(Called(), (x,))


def main() -> None:
    torch.manual_seed(0)
    print(f"{'':<30}{'saved MB per image':>26}{'copies MB':>11}{'dispatched':>20}")
    print(f"{'':<30}{'stock':>10}{'gdd_fast':>10}{'%':>6}{'':>11}{'stock':>11}{'gdd_fast':>9}")
    for name, make in CASES.items():
        try:
            net, call, resolution = make()
        except ImportError as error:
            print(f"{name:<30}left out: {error}")
            continue
        net.eval().requires_grad_(False)
        stock = measure(net, call, resolution)
        accelerate(net)
        ours = measure(net, call, resolution)
        saved = f"{stock[0] / 1e6:>10.1f}{ours[0] / 1e6:>10.2f}{100 * ours[0] / stock[0]:>6.1f}"
        print(f"{name:<30}{saved}{ours[1] / 1e6:>11.1f}{stock[2]:>11}{ours[2]:>9}", flush=True)


if __name__ == "__main__":
    main()
