"""Progressive distillation: Salimans & Ho (arXiv 2202.00512), algorithm 2, for EDM's noise (alpha = 1, sigma = t)."""

import copy

import torch
from torch import Tensor

from gdd_fast.distill.teacher_losses.teacher_loss import (
    Setup,
    TeacherLoss,
    column,
    draw_integers,
    draw_noise,
    euler_step,
)
from gdd_fast.models.preconditioned import Preconditioned


class ProgressiveLoss(TeacherLoss):
    """The student learns to do two DDIM steps of its teacher in one; after each stage it becomes the teacher.

    Stage k has N = `pd_steps` / 2^k steps of the student, on 2 N + 1 noise levels; the last one has N = 1. The teacher
    gets from t via t' at t'' to x''; a student that gets there in one step predicts

        target = (x'' - (t'' / t) x_t) / (1 - t'' / t)

    and its loss is max(1 / t^2, 1) d(D(x_t; t), target): the paper's truncated SNR weight.
    """

    stage: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.first_steps = self.options.pd_steps
        self.stage_images = round(self.options.pd_stage_kimg * 1e3)
        self.last_stage = self.first_steps.bit_length() - 1
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.stage_teacher: Preconditioned | None = None
        self._enter(0)

    def begin(self, net: Preconditioned, images: int) -> None:
        stage = min(images // self.stage_images, self.last_stage)
        if stage != int(self.stage):
            self.stage_teacher = copy.deepcopy(net).eval().requires_grad_(False)
            self._enter(stage)

    def _enter(self, stage: int) -> None:
        self.stage.fill_(stage)
        self.grid = self.levels(2 * (self.first_steps >> stage) + 1)

    def forward(self, net: Preconditioned, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
        end = 2 * draw_integers(0, len(self.grid) // 2 - 1, len(images), random)
        last, middle, first = self.grid[end], self.grid[end + 1], self.grid[end + 2]
        x = images + column(first) * draw_noise(images, random)
        with torch.no_grad():
            teacher = self.stage_teacher or self.teachers[0]
            there = euler_step(teacher, euler_step(teacher, x, first, middle, labels), middle, last, labels)
            ratio = column(last / first)
            target = (there - ratio * x) / (1 - ratio)
        return first.square().reciprocal().clamp(min=1) * self.distance(net(x, first, labels), target)

    def restore(self, state: dict[str, Tensor], net: Preconditioned) -> None:
        if int(state["stage"]):
            self.stage_teacher = copy.deepcopy(net).eval().requires_grad_(False)
        super().restore(state, net)
        self._enter(int(self.stage))
