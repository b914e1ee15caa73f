"""What images are described by before their distributions are compared.

A distance compares only with distances of the same features at the same resolution, so both are part of the name that
travels with the statistics. None of these is the Inception network of published FIDs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from gdd_fast.device import full_float32
from gdd_fast.errors import ConfigError
from gdd_fast.models.backbone_weights import load_backbone_weights
from gdd_fast.models.backbones import build_backbone, fold_batch_norm

FeatureName = Literal["lite0", "pixels"]
LITE0 = "tf_efficientnet_lite0"


class FeatureExtractor(Protocol):
    """A fixed function from images to vectors."""

    name: str
    """Names the function and its settings, for example `lite0-64`."""
    network: nn.Module | None
    """What computes them, if anything does that has fused operators to choose; see layers.backends.choose_backend."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `(N, C, H, W)`, C 1 or 3 -> float32 `(N, F)`, without gradient, on the extractor's device."""


class Lite0Features:
    """ImageNet EfficientNet-lite0 after global average pooling, 1280 features.

    Images are resized to `resolution` pixels (bilinear, antialiased when they shrink), gray ones repeated to three
    channels. 64 is enough for images of up to 64 pixels and costs a twelfth of ImageNet's 224. Where lite0 is also a
    discriminator backbone, the generator has been trained against these features: report `pixels` beside it.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, resolution: int = 64, device: torch.device | str = "cpu"):
        if resolution < 32 or resolution % 32:
            raise ConfigError(f"the resolution of lite0 features has to be a multiple of 32, not {resolution}")
        self.name = f"lite0-{resolution}"
        self.resolution, self.device = resolution, torch.device(device)
        # channels_last: twice as fast on a CPU, whose depthwise convolutions are made for it.
        self.network = fold_batch_norm(build_backbone(LITE0, weights, resolution)).to(
            device, memory_format=torch.channels_last
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 127.5 - 1  # lite0's own normalisation, (rgb01 - 0.5) / 0.5
        if x.shape[-2:] != (self.resolution, self.resolution):
            x = interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with full_float32():  # statistics made on one device stand for those of another
            return self.network.pooled(x)


class PixelFeatures:
    """The pixels themselves in [0, 1], averaged down to at most `resolution` x `resolution`; C * H * W features.

    Blind to anything fine, but no network stands between it and the images: a check on features that a generator was
    trained against.
    """

    network = None

    def __init__(self, *, resolution: int = 16, device: torch.device | str = "cpu"):
        if resolution < 1:
            raise ConfigError(f"pixel features need a resolution of at least 1, not {resolution}")
        self.name = f"pixels-{resolution}"
        self.resolution, self.device = resolution, torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 255
        return adaptive_avg_pool2d(x, min(x.shape[-1], self.resolution)).flatten(1)


def build_extractor(
    name: str, *, resolution: int | None = None, weights: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor `lite0` or `pixels`; `resolution` None is its default, 64 and 16.

    `weights` is a local file of lite0's weights; by default they come as `load_backbone_weights` finds them. Raises
    `ConfigError` for another name or a resolution that is too small, `WeightsError` if the weights cannot be had.
    """
    options = {"device": device} | ({} if resolution is None else {"resolution": resolution})
    match name:
        case "lite0":
            return Lite0Features(load_backbone_weights(LITE0, weights), **options)
        case "pixels":
            return PixelFeatures(**options)
        case _:
            raise ConfigError(f"unknown features {name!r}; choose from {', '.join(get_args(FeatureName))}")
