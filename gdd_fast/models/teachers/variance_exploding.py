"""Score networks of variance-exploding models: Song et al., arXiv 2011.13456 (score_sde_ve), diffusers' ScoreSdeVe.

The network reads the noisy image itself, with values from 0 to 1, and the noise level as its time; it returns the
score, (D - x) / sigma^2. For images from -1 to 1 noise is twice as large: x01 = (x + 1) / 2, sigma01 = sigma / 2, and

    D = x + sigma^2 / 2 F((x + 1) / 2, sigma / 2)
"""

from typing import Any

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.teachers.parametrisation import Coefficients, Parametrisation


class VarianceExploding(Parametrisation):
    """Arguments: lowest and highest noise levels, as for the scheduler, for images from 0 to 1."""

    kind = "ve"
    schedulers = ("ScoreSdeVeScheduler",)
    predicts_noise = True

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 1348.0) -> None:
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise ConfigError(
                f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}."
            )
        self._options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        self.sigma_min, self.sigma_max = 2 * sigma_min, 2 * sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        half = torch.full_like(sigma, 0.5)
        return Coefficients(torch.ones_like(sigma), sigma.square() / 2, half, sigma / 2, shift=0.5)

    def options(self) -> dict[str, Any]:
        return dict(self._options)
