"""The interface of every network to training, samplers, folding, evaluation and the Hub: a denoiser D(x; sigma).

A subclass adds its constructor, `init_config` and `forward`; most other code does not depend on what is inside.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError

SIGMA_INIT = 80.0


class Preconditioned(nn.Module):
    """A network called as `net(x, sigma, class_labels=None)`, which returns denoised images.

    Attributes:
        img_resolution, img_channels, label_dim: side and channels of the square images, number of classes (0: none).
        sigma_min, sigma_max: range of supported noise levels; samplers clamp to it.
        sigma_init: the noise level at which a one-step generator is evaluated.
        dtype: what it computes in.
        predicts_noise: whether the image is x minus predicted noise, as in many networks of other libraries.
        learns_velocity: whether it predicts noise and `gdd_fast.pretrain --teacher` can teach it to predict v.
        foreign: whether its layers are another library's, which `gdd_fast.accelerate` makes faster.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    sigma_min: float
    sigma_max: float
    sigma_init: float
    dtype: torch.dtype
    predicts_noise: bool = False
    learns_velocity: bool = False
    foreign: ClassVar[bool] = False

    @abstractmethod
    def init_config(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild this network, in JSON's types."""

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest supported noise level, which is `sigma` itself, as levels are continuous."""
        return torch.as_tensor(sigma)

    def _check_images(self, x: Tensor) -> None:
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ConfigError(f"the network takes images (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}.")

    def _noise_levels(self, sigma: Tensor | float, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`sigma` as (N,) or (1,) on the device of x."""
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).flatten()
        if sigma.shape[0] not in (1, x.shape[0]):
            raise ConfigError(f"sigma must hold 1 or {x.shape[0]} noise levels, got {sigma.shape[0]}.")
        return sigma

    def _class_labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        """Labels float32 (N, label_dim) or (1, label_dim); None for a network without classes."""
        if self.label_dim == 0:
            if labels is not None and labels.shape[-1] != 0:
                raise ConfigError(f"the network has no classes, got class_labels {tuple(labels.shape)}: give None.")
            return None
        if labels is None:
            return torch.zeros(1, self.label_dim, device=x.device)
        if not is_row_each(labels, x, self.label_dim):
            raise ConfigError(
                f"class_labels must be one-hot, ({x.shape[0]}, {self.label_dim}), got {tuple(labels.shape)}: "
                f"torch.nn.functional.one_hot(classes, {self.label_dim}) makes them."
            )
        return labels.to(torch.float32)


def is_row_each(labels: Tensor, x: Tensor, width: int) -> bool:
    """Whether `labels` is (N, width) or (1, width) for the N images of `x`."""
    return labels.ndim == 2 and labels.shape[0] in (1, x.shape[0]) and labels.shape[1] == width


def check_sigma_init(sigma: Any, sigma_min: float, sigma_max: float) -> float:
    """`sigma` as the noise level of the one step. Raises ConfigError if the network does not support it."""
    usable = isinstance(sigma, int | float) and not isinstance(sigma, bool) and sigma > 0
    if not usable or not sigma_min <= sigma <= sigma_max or sigma == float("inf"):
        raise ConfigError(
            f"sigma_init must be a noise level of the network, {sigma_min:.4g} to {sigma_max:.4g}, got {sigma!r:.100}."
        )
    return float(sigma)
