"""`python -m benchmarks.counts.accelerated`: what `gdd_fast.accelerate` saves in other people's networks, on this CPU.

    saved       bytes that an image's forward pass keeps for backward, with everything frozen and the gradient of the
                input wanted, as `benchmarks.counts.saved_bytes` counts them: an eighth of those of sixteen images less
                those of eight
    copies      bytes that it keeps whatever the batch: folded and converted weights, for the one backward pass
    dispatched  operators that one forward pass without gradients dispatches

Needs timm, torchvision and diffusers; a network whose library is missing is left out, and said to be.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.counts.dispatched import count
from benchmarks.counts.saved_bytes import DDPM_CIFAR10, saved_bytes
from gdd_fast import accelerate

BATCH = 8  # images at which most norms of these networks are folded

NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet50 (timm)": (224, lambda: import_module("timm").create_model("resnet50")),
    "resnet50 (torchvision)": (224, lambda: import_module("torchvision.models").resnet50()),
    "vgg16_bn (torchvision)": (224, lambda: import_module("torchvision.models").vgg16_bn().features),
    "tf_efficientnet_lite0 (timm)": (224, lambda: import_module("timm").create_model("tf_efficientnet_lite0")),
    "ddpm-cifar10-32 (diffusers)": (32, lambda: import_module("diffusers").UNet2DModel(**DDPM_CIFAR10)),
}
"""Resolution, and the network with random weights."""


def measure(net: nn.Module, resolution: int) -> tuple[int, int, int]:
    """Saved bytes per image, bytes of copies, operators dispatched."""

    def call(x: Tensor) -> Tensor:
        return net(x, 10).sample if hasattr(net, "time_embedding") else net(x)

    images = [torch.randn(n, 3, resolution, resolution, requires_grad=True) for n in (BATCH, 2 * BATCH)]
    once, twice = (saved_bytes(net, (x,), call) for x in images)
    return (twice - once) // BATCH, max(2 * once - twice, 0), count(call, images[0].detach()).total


def main() -> None:
    torch.manual_seed(0)
    row = "{:<30}{:>10}{:>10}{:>6}{:>11}{:>11}{:>9}".format
    print(row("", "saved MB", "per image", "", "copies MB", "dispatched", ""))
    print(row("", "stock", "gdd_fast", "%", "", "stock", "gdd_fast"))
    for name, (resolution, make) in NETWORKS.items():
        try:
            net = make().eval().requires_grad_(False)
        except ImportError as error:
            print(f"{name:<30}left out: {error}")
            continue
        stock = measure(net, resolution)
        accelerate(net)
        ours = measure(net, resolution)
        saved = f"{stock[0] / 1e6:.1f}", f"{ours[0] / 1e6:.2f}", f"{100 * ours[0] / stock[0]:.1f}"
        print(row(name, *saved, f"{ours[1] / 1e6:.1f}", stock[2], ours[2]), flush=True)


if __name__ == "__main__":
    main()
