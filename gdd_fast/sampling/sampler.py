"""From latents to images: the deterministic and stochastic samplers of EDM, and the one step of GDD.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364),
algorithms 1 and 2, equation 5. These are plain differentiable functions; wrap a call in `torch.no_grad()` to sample.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from gdd_fast.errors import ConfigError

# D(x; sigma): (N, C, H, W), sigma (N,), one-hot labels or None -> denoised (N, C, H, W)
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
NoiseSource = Callable[[torch.Tensor], torch.Tensor]

SIGMA_MAX = 80.0


def one_step(
    net: Denoiser, latents: torch.Tensor, labels: torch.Tensor | None = None, sigma: float | None = None
) -> torch.Tensor:
    """`D(sigma * z; sigma)`: latents z `(N, C, H, W)` and labels `(N, label_dim)` -> images `(N, C, H, W)`.

    By default sigma is `net.sigma_init`, or 80 for a network without it.
    """
    sigma = getattr(net, "sigma_init", SIGMA_MAX) if sigma is None else sigma
    return net(latents * sigma, _noise_level(sigma, latents), labels)


def noise_levels(
    steps: int = 18, sigma_min: float = 0.002, sigma_max: float = SIGMA_MAX, rho: float = 7.0
) -> list[float]:
    """Equation 5: `steps` levels from `sigma_max` down to `sigma_min`, then 0. One step goes straight to 0.

    Raises `ConfigError` for a schedule that does not go down.
    """
    if steps < 1:
        raise ConfigError(f"a sampler needs at least 1 step, not {steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ConfigError(f"noise levels must satisfy 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    if rho <= 0:
        raise ConfigError(f"rho must be positive, not {rho}")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + i / max(steps - 1, 1) * (last - first)) ** rho for i in range(steps)] + [0.0]


def heun(
    net: Denoiser,
    latents: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = SIGMA_MAX,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    noise: NoiseSource = torch.randn_like,
) -> torch.Tensor:
    """Solve the probability-flow ODE with Heun's method; `2 * steps - 1` evaluations of `net`.

    `latents` z `(N, C, H, W)` -> images of the same shape and dtype. The state is float64; `net` is called in the
    dtype of `latents`. Noise levels are clipped to `net.sigma_min` and `net.sigma_max` if it has them. The step to zero
    is Euler's. With `s_churn > 0`, fresh noise from `noise(x)` (standard normal like x; give `SeedStreams.normal_like`
    for results that depend on the seed alone) is added between `s_min` and `s_max`. Raises `ConfigError` for a schedule
    that does not go down.
    """
    levels = noise_levels(
        steps, max(sigma_min, getattr(net, "sigma_min", 0.0)), min(sigma_max, getattr(net, "sigma_max", math.inf)), rho
    )

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        denoised = net(x.to(latents.dtype), _noise_level(sigma, latents), labels)
        return (x - denoised) / sigma

    x = latents.double() * levels[0]
    for here, there in pairwise(levels):
        if s_churn > 0:
            # Drawn even where it is not added, so that s_min and s_max do not shift the noise of later steps.
            fresh = noise(x)
            gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= here <= s_max else 0.0
            raised = here * (1 + gamma)
            x = x + math.sqrt(raised**2 - here**2) * s_noise * fresh
            here = raised
        d = slope(x, here)
        euler = x + (there - here) * d
        x = euler if there == 0 else x + (there - here) * (d + slope(euler, there)) / 2
    return x.to(latents.dtype)


def _noise_level(sigma: float, latents: torch.Tensor) -> torch.Tensor:
    return torch.full((len(latents),), sigma, dtype=latents.dtype, device=latents.device)
