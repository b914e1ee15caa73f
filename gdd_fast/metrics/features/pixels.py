"""The pixels themselves: features without a network."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gdd_fast.errors import ConfigError


class PixelFeatures:
    """The pixels themselves in [0, 1], averaged down to at most `resolution` x `resolution`; C * H * W features.

    Blind to fine detail, but independent of any network: a check on features that a generator was trained against.
    """

    network = backbone = dim = None

    def __init__(self, *, resolution: int = 16, device: torch.device | str = "cpu"):
        if resolution < 1:
            raise ConfigError(f"pixel features need a resolution of at least 1, not {resolution}")
        self.name = f"pixels-{resolution}"
        self.resolution, self.device = resolution, torch.device(device)

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "PixelFeatures":
        if weights is not None:
            raise ConfigError(f"pixels have no weights, but {weights} was given for them")
        return cls(**options)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images.to(self.device).float())

    def features(self, pixels: Tensor) -> Tensor:
        x = pixels / 255
        return adaptive_avg_pool2d(x, min(x.shape[-1], self.resolution)).flatten(1)
