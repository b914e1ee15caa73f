"""VGG-16 with and without batch norm (Simonyan & Zisserman, arXiv 1409.1556), convolutions only."""

from collections.abc import Iterator

from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.models.backbones.base import Backbone, ConvNorm
from gdd_fast.ops.max_pool2x2 import OPERATOR, max_pool2x2

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class MaxPool2x2(nn.Module):
    """Maxima of 2x2 windows."""

    operator = OPERATOR
    backend: Backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2x2(x, self.backend)


class Vgg16(Backbone):
    """`features` of torchvision's `vgg16_bn` or `vgg16`, tapped before each of the last four poolings.

    These are Projected GAN's taps (before layers 13, 23, 33 and 43 of `vgg16_bn`; 9, 16, 23 and 30 of `vgg16`): strides
    2 to 16, twice as fine as in the other backbones.
    """

    tap_channels = (128, 256, 512, 512)
    tap_strides = (2, 4, 8, 16)
    unused_weights = ("classifier.", "pre_logits.", "head.")

    def __init__(self, batch_norm: bool):
        super().__init__()
        self.name = "vgg16_bn" if batch_norm else "vgg16"
        layers: list[nn.Module] = []
        channels = 3
        for stage in _STAGES:
            for out_channels in stage:
                layers.append(FrozenConv2d(channels, out_channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU(inplace=True))
                channels = out_channels
            layers.append(MaxPool2x2())
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stage_ends = []
        layers = [layer for layer in self.features if not isinstance(layer, nn.Identity)]
        for before, layer, after in zip([None, *layers], layers, [*layers[1:], None], strict=False):
            if isinstance(layer, nn.ReLU) and isinstance(before, FrozenConv2d):
                continue  # already applied by the convolution
            if isinstance(layer, MaxPool2x2 | nn.MaxPool2d):  # PyTorch's own pooling, if someone inserted one
                stage_ends.append(x)
            x = layer(x, "relu") if isinstance(layer, FrozenConv2d) and isinstance(after, nn.ReLU) else layer(x)
        return (*stage_ends[1:], x)

    def conv_norms(self) -> Iterator[ConvNorm]:
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.BatchNorm2d):
                yield ConvNorm(self.features, str(i - 1), str(i))
