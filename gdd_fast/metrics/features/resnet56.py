"""ResNet-56 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): a judge made for 32 x 32 images.

It sees images at the resolution it was trained on, while ImageNet's networks see them enlarged.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.errors import ConfigError
from gdd_fast.layers.frozen_conv import FrozenConv2d, conv_norm_relu
from gdd_fast.metrics.features.extractor import NetworkFeatures, of_bytes, resized
from gdd_fast.metrics.features.weight_files import WeightFile
from gdd_fast.models.backbones import ConvNorm, fold_batch_norm, made_of
from gdd_fast.models.backbones.base import IMAGENET_MEAN, IMAGENET_STD

FILE = WeightFile(
    "resnet56",
    ("resnet56-4bfd9763.th", "cifar-resnet56.safetensors"),
    "in pretrained_models of github.com/akamaster/pytorch_resnet_cifar10",
    digests=frozenset({"3046110bc316c9657d4fc4706059e56167498ba3396c29a078bcd71a666cf190"}),
)
_BLOCKS = 9
_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: every other pixel, with zeros for missing channels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.stride, self.missing = (1, 0) if in_channels == out_channels else (2, out_channels - in_channels)
        self.conv1 = FrozenConv2d(in_channels, out_channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = FrozenConv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(conv_norm_relu(self.conv1, self.bn1, x, "relu")))
        before = self.missing // 2
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))
        return F.relu(h + x)


class ResNet56(nn.Module):
    """(N, 3, 32, 32) normalised as for ImageNet -> the 64 features before the classifier; `logits`: its 10 scores."""

    def __init__(self):
        super().__init__()
        self.conv1 = FrozenConv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        channels = _WIDTHS[0]
        for number, width in enumerate(_WIDTHS, start=1):
            blocks = [BasicBlock(channels if i == 0 else width, width) for i in range(_BLOCKS)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            channels = width
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_relu(self.conv1, self.bn1, x, "relu")
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self(x))

    def conv_norms(self) -> Iterator[ConvNorm]:
        """Every convolution that is followed by a batch norm."""
        for module in self.modules():
            if hasattr(module, "conv1"):
                yield ConvNorm(module, "conv1", "bn1")
            if hasattr(module, "conv2"):
                yield ConvNorm(module, "conv2", "bn2")


class ResNet56Features(NetworkFeatures):
    """The 64 features of CIFAR-10's ResNet-56 at 32 x 32; images of another size are resized."""

    dim = 64

    def __init__(self, weights: Mapping[str, Tensor], *, resolution: int = 32, device: torch.device | str = "cpu"):
        if resolution != 32:
            raise ConfigError(f"resnet56 takes images of 32 pixels, not {resolution}")
        network = made_of(ResNet56, "CIFAR-10's ResNet-56", weights)
        self.name = FILE.name_of(network.state_dict(), resolution)
        self.device = torch.device(device)
        self.network = fold_batch_norm(network).to(device, memory_format=torch.channels_last)
        self._mean, self._std = of_bytes(IMAGENET_MEAN, device), of_bytes(IMAGENET_STD, device)

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "ResNet56Features":
        state = {key.removeprefix("module."): value for key, value in FILE.read(weights).items()}
        return cls(state, **options)

    def _features(self, pixels: Tensor) -> Tensor:
        x = (resized(pixels, 32) - self._mean) / self._std
        return self.network(x.contiguous(memory_format=torch.channels_last))
