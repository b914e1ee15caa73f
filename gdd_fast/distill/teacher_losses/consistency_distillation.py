"""Consistency distillation: Song et al., "Consistency Models" (arXiv 2303.01469), algorithm 2 and equation 7."""

import torch
from torch import Tensor

from gdd_fast.distill.teacher_losses.teacher_loss import (
    Setup,
    SlowCopy,
    TeacherLoss,
    column,
    draw_integers,
    draw_noise,
    heun_step,
)
from gdd_fast.models.preconditioned import Preconditioned


class ConsistencyLoss(TeacherLoss):
    """d(f(x + t_{n+1} z, t_{n+1}), f'(x', t_n)), n uniform, with x' a Heun step of the teacher from t_{n+1} to t_n.

    f' is the student without gradient (Song & Dhariwal, arXiv 2310.14189) or, with a `target_ema`, its slow copy. The
    weight is 1. At t_1 the student is the identity, by GDD's preconditioning.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.grid = self.levels(self.options.teacher_loss_levels)
        self.slow = SlowCopy(setup.student, self.options.target_ema) if self.options.target_ema else None

    def forward(self, net: Preconditioned, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
        n = draw_integers(0, len(self.grid) - 2, len(images), random)
        lower, upper = self.grid[n], self.grid[n + 1]
        x = images + column(upper) * draw_noise(images, random)
        with torch.no_grad():
            target = net if self.slow is None else self.slow.net
            target = target(heun_step(self.teachers[0], x, upper, lower, labels), lower, labels)
        return self.distance(net(x, upper, labels), target)

    def end(self, net: Preconditioned) -> None:
        if self.slow is not None:
            self.slow.follow(net)
