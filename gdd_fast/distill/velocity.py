"""Teaches a network that predicts noise to predict v, with its own schedule and starting from its own weights.

Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512), section 4: where
noise is strong, a network that predicts noise outputs almost its input, and so cannot generate in one step. For x_t = a
x0 + s n, v = a n - s x0 is close to minus the image where noise is strong, and to the noise where it is weak. For D(x;
sigma) = skip x + out F the loss is the mean squared error of F, at the times of the schedule. docs/teachers.md shows
what this gains for a distillation.
"""

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.teachers.unet2d import UNet2DPrecond
from gdd_fast.models.teachers.variance_preserving import VariancePreserving


def with_velocity(teacher: Preconditioned, name: str) -> UNet2DPrecond:
    """A network that predicts v, with the weights and the schedule of `teacher`; in training mode.

    `name` is what messages call the teacher.

    Raises ConfigError for a network that is not a diffusers U-Net with a schedule defined by betas.
    """
    if not isinstance(teacher, UNet2DPrecond) or not isinstance(teacher.parametrisation, VariancePreserving):
        raise ConfigError(
            f"{name} cannot learn to predict v: that takes a UNet2DModel of diffusers with a schedule defined by "
            "betas (DDPM, DDIM and the like)"
        )
    init = teacher.init_config()
    init |= {"parametrisation": teacher.parametrisation.with_velocity().config(), "sigma_init": None}
    net = UNet2DPrecond(**init)
    net.load_state_dict(teacher.state_dict())
    return net.train()


def velocity_loss(net: UNet2DPrecond, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
    """Squared error of v per image: images (N, C, H, W) in [-1, 1] -> (N,), summed over C, H, W."""
    schedule = net.parametrisation
    assert isinstance(schedule, VariancePreserving)
    levels = schedule.levels(images.device)
    times = torch.randint(len(levels), [len(images)], device=images.device, generator=random)
    sigma = levels[times]
    weight = schedule.coefficients(sigma).out.square().reciprocal().float()[:, None, None, None]
    noise = torch.randn(images.shape, device=images.device, generator=random)
    noisy = images + noise * sigma.float()[:, None, None, None]
    return (weight * (net(noisy, sigma, labels) - images) ** 2).sum(dim=(1, 2, 3))
