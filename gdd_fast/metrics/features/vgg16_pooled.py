"""ImageNet VGG-16 (Simonyan & Zisserman, arXiv 1409.1556), its last convolution averaged over the image."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.metrics.features.extractor import NetworkFeatures, check_multiple_of_32, of_bytes, resized
from gdd_fast.metrics.features.weight_files import WeightFile
from gdd_fast.models.backbones import made_of
from gdd_fast.models.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from gdd_fast.models.backbones.vgg import Vgg16

FILE = WeightFile(
    "vgg16",
    ("vgg16-397923af.pth", "vgg16-features-fp16.safetensors"),
    "torchvision's vgg16 of IMAGENET1K_V1, https://download.pytorch.org/models/vgg16-397923af.pth",
    digests=frozenset({"4caa38fc80a98bef0fd9c8b20f32e7789a438f8be5dae2ac8f86e450e9ea1ca9"}),
)


class Vgg16Features(NetworkFeatures):
    """VGG-16's 512 features after the last ReLU, averaged over positions; images are resized to `resolution` pixels.

    Improved precision and recall were published with the 4,096 outputs of its second fully connected layer instead, so
    values with these features are not comparable with those figures.
    """

    dim = 512
    backbone = "vgg16"

    def __init__(self, weights: Mapping[str, Tensor], *, resolution: int = 64, device: torch.device | str = "cpu"):
        check_multiple_of_32("vgg16", resolution)
        network = made_of(partial(Vgg16, batch_norm=False), "vgg16", weights)
        self.name = FILE.name_of(network.state_dict(), resolution)
        self.resolution, self.device = resolution, torch.device(device)
        self.network = network.to(device, memory_format=torch.channels_last)
        self._mean, self._std = of_bytes(IMAGENET_MEAN, device), of_bytes(IMAGENET_STD, device)

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "Vgg16Features":
        return cls(FILE.read(weights), **options)

    def _features(self, pixels: Tensor) -> Tensor:
        x = (resized(pixels, self.resolution) - self._mean) / self._std
        return self.network(x.contiguous(memory_format=torch.channels_last))[-1].mean(dim=(2, 3))
