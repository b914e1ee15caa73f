"""What the teacher losses have in common: noise levels, steps of the teacher's ODE, and a slow copy of the student.

Everything is in EDM's parametrisation (Karras et al., arXiv 2206.00364): x_t = x + t z, a denoiser D(x_t; t), and
dx/dt = (x - D(x; t)) / t. The noise levels are those of its equation 5 with rho 7.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdd_fast.config import AblationConfig
from gdd_fast.distill.teacher_losses.image_distances import Distance
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.sampling.sampler import noise_levels

SIGMA_MIN = 0.002


@dataclass(frozen=True)
class Setup:
    """What a loss is built from. Networks are on the training device; the teacher is frozen."""

    options: AblationConfig
    teacher: Preconditioned
    student: Preconditioned
    distance: Distance


class TeacherLoss(nn.Module):
    """A loss of the trained network against a teacher.

    `state_dict()` is what a checkpoint keeps; networks that a checkpoint holds elsewhere are not part of it. The loss's
    parameters, if it has any, train with the generator's.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.options, self.distance_of = setup.options, (setup.distance,)
        self.teachers = [setup.teacher]
        self.sigma_max = setup.student.sigma_init
        self.device = next(setup.student.parameters()).device

    def begin(self, net: Preconditioned, images: int) -> None:
        """Called before the iteration that follows `images` images."""

    def forward(self, net: Preconditioned, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
        """Real images (N, C, H, W) in [-1, 1] and one-hot labels or None -> losses (N,)."""
        raise NotImplementedError

    def end(self, net: Preconditioned) -> None:
        """Called after the generator's step."""

    def restore(self, state: dict[str, Tensor], net: Preconditioned) -> None:
        """Resume from the `state_dict()` in a checkpoint; `net` is already restored."""
        self.load_state_dict(state)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return self.distance_of[0](a, b)

    def levels(self, count: int) -> Tensor:
        """Float32 (count,): t_1 = 0.002 < ... < t_count, the noise level of the one step."""
        levels = noise_levels(count, SIGMA_MIN, self.sigma_max)[:-1]
        return torch.tensor(levels[::-1], dtype=torch.float32, device=self.device)


class SlowCopy(nn.Module):
    """An exponential moving average of the student's weights, which moves by 1 - `decay` at every `follow`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.net = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        torch._foreach_lerp_(list(self.net.parameters()), list(module.parameters()), 1 - self.decay)


def draw_integers(low: int, high: Tensor | int, count: int, random: torch.Generator) -> Tensor:
    """(count,) integers from `low` to `high` inclusive; `high` may be (count,)."""
    uniform = torch.rand(count, device=random.device, generator=random, dtype=torch.float64)
    return (low + (uniform * (high - low + 1)).floor().long()).clamp(max=high)


def draw_noise(images: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(images.shape, device=images.device, generator=random)


def column(t: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1)."""
    return t.reshape(-1, 1, 1, 1)


def euler_step(net: nn.Module, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    """From x at noise levels t (N,) to s (N,): the first-order step of the ODE, which is DDIM's."""
    return x + column((s - t) / t) * (x - net(x, t, labels))


def heun_step(net: nn.Module, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    """As `euler_step`, of second order; s > 0."""
    slope = (x - net(x, t, labels)) / column(t)
    there = x + column(s - t) * slope
    return x + column(s - t) * (slope + (there - net(there, s, labels)) / column(s)) / 2
