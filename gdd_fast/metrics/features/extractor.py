"""The interface between feature networks and metrics, and the preprocessing of images."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdd_fast.device import full_float32
from gdd_fast.errors import ConfigError, InputError


class FeatureExtractor(Protocol):
    """A fixed function from images to vectors."""

    name: str
    """Names the function and its settings, such as `lite0-64`; for unpublished weights their digest is part of it."""
    network: nn.Module | None
    """The network that computes the features, None without one; for layers.backends.choose_backend."""
    backbone: str | None
    """The ImageNet network behind it, by its name as a discriminator's backbone, without `_bn`; None for any other."""
    dim: int | None
    """F; None if it depends on the images."""
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `(N, C, H, W)`, C 1 or 3 -> float32 `(N, F)`, without gradient, on the extractor's device."""

    def features(self, pixels: Tensor) -> Tensor:
        """The same for float32 `(N, 3, H, W)` from 0 to 255 on the extractor's device, differentiable.

        Without a network, the number of channels is that of the images.
        """


class NetworkFeatures:
    """What the feature networks have in common."""

    backbone: str | None = None
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.features(rgb(images, self.device))

    def features(self, pixels: Tensor) -> Tensor:
        with full_float32():  # statistics made on one device are used on others
            return self._features(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


def rgb(images: Tensor, device: torch.device) -> Tensor:
    """uint8 `(N, 1 or 3, H, W)` -> float32 `(N, 3, H, W)` from 0 to 255 on `device`; gray is repeated.

    Raises `InputError` for images of another type or number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"features need uint8 images (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    return images.to(device).float().expand(-1, 3, -1, -1)


def resized(x: Tensor, resolution: int, mode: str = "bilinear") -> Tensor:
    """`x` float `(N, C, H, W)` resized to `resolution` x `resolution`, antialiased if it shrinks."""
    if x.shape[-2:] == (resolution, resolution):
        return x
    return interpolate(x, size=(resolution, resolution), mode=mode, antialias=True, align_corners=False)


def of_bytes(values: Sequence[float], device: torch.device | str) -> Tensor:
    """Per-channel means or deviations for values from 0 to 1, as float32 (C, 1, 1) for values from 0 to 255."""
    return torch.tensor(values, device=device)[:, None, None] * 255


def check_multiple_of_32(name: str, resolution: int) -> None:
    """Raise `ConfigError` for a resolution that is not a multiple of an ImageNet network's total stride."""
    if resolution < 32 or resolution % 32:
        raise ConfigError(f"the resolution of {name} features must be a multiple of 32, not {resolution}")
