"""Consistency trajectory distillation: Kim et al., "Consistency Trajectory Models" (arXiv 2310.02279)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gdd_fast.distill.teacher_losses.teacher_loss import (
    SIGMA_MIN,
    Setup,
    SlowCopy,
    TeacherLoss,
    column,
    draw_integers,
    draw_noise,
    heun_step,
)
from gdd_fast.models.preconditioned import Preconditioned

_HIDDEN = 64


class EndEmbedding(nn.Module):
    """The offset to the U-Net's embedding for a jump that ends at noise level s: (N,) -> (N, channels).

    It is zero at s = 0.002, so that a jump to the end is the plain generator and needs no further weights; untrained,
    it is zero everywhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(1, _HIDDEN)
        self.outer = nn.Linear(_HIDDEN, channels, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, s: Tensor) -> Tensor:
        # of one shape: elsewhere in a vector the same number may go through other instructions, which round otherwise
        inner, start = (silu(self.inner(t.log().reshape(-1, 1) / 4)) for t in (s, torch.full_like(s, SIGMA_MIN)))
        return self.outer(inner - start)


class TrajectoryLoss(TeacherLoss):
    """d(G'(G(x_t, t, s), s, 0), G'(G'(x_u, u, s), s, 0)) + w ||x - g(x_t, t, t)||^2, with s <= u < t.

    G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s), the paper's G; G' is the student's slow copy; x_u is the teacher's
    solution from x_t, by up to `ctm_solver_steps` Heun steps on the grid (soft consistency matching). t, s and
    the number of steps are uniform on the grid of noise levels. "0" is t_1 = 0.002. The second term is denoising score
    matching, averaged over pixels, with w = `ctm_dsm_weight`, a constant here and adaptive in the paper.

    Here g is the one-step generator with an `EndEmbedding` of s.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.grid = self.levels(self.options.teacher_loss_levels)
        channels = len(setup.student.model.map_layer1.weight)  # type: ignore[union-attr,arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # no influence at the start: the layer after these starts at 0
            self.embedding = EndEmbedding(channels).to(self.device)
        # with decay 0 it is the student as of the last step, in weights without gradients
        self.slow = SlowCopy(setup.student, self.options.target_ema)
        self.slow_embedding = SlowCopy(self.embedding, self.options.target_ema)

    def forward(self, net: Preconditioned, images: Tensor, labels: Tensor | None, random: torch.Generator) -> Tensor:
        count, steps = len(images), self.options.ctm_solver_steps
        start = draw_integers(1, len(self.grid) - 1, count, random)
        end = draw_integers(0, start - 1, count, random)
        solved = draw_integers(1, (start - end).clamp(max=steps), count, random)
        t, s = self.grid[start], self.grid[end]
        x = images + column(t) * draw_noise(images, random)
        with torch.no_grad():
            reached = self._solve(x, start, solved, labels)
            target = self._slow_jump(reached, self.grid[start - solved], s, labels)
            target = self._to_the_end(target, s, labels)
        loss = self.distance(self._to_the_end(self._jump(net, self.embedding, x, t, s, labels), s, labels), target)
        if not self.options.ctm_dsm_weight:
            return loss
        denoised = self._denoise(net, self.embedding, x, t, t, labels)
        return loss + self.options.ctm_dsm_weight * (denoised - images).square().mean(dim=(1, 2, 3))

    def _solve(self, x: Tensor, start: Tensor, steps: Tensor, labels: Tensor | None) -> Tensor:
        """Solve the teacher's ODE from the grid's level `start` for `steps` levels down, both (N,)."""
        for number in range(self.options.ctm_solver_steps):
            here = (start - number).clamp(min=1)
            there = heun_step(self.teachers[0], x, self.grid[here], self.grid[here - 1], labels)
            x = torch.where(column(number < steps), there, x)
        return x

    def _to_the_end(self, x: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Jump to the end with the slow copy; gradients flow through x alone."""
        return self._slow_jump(x, s, self.grid[:1].expand_as(s), labels)

    def _slow_jump(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return self._jump(self.slow.net, self.slow_embedding.net, x, t, s, labels)

    def _jump(
        self, net: nn.Module, embedding: nn.Module, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None
    ) -> Tensor:
        """G(x, t, s); x itself where s = t."""
        ratio = column(s / t)
        return ratio * x + (1 - ratio) * self._denoise(net, embedding, x, t, s, labels)

    def _denoise(
        self, net: nn.Module, embedding: nn.Module, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None
    ) -> Tensor:
        """g(x, t, s)."""
        with _moved(net.model.map_layer1, embedding(s)):  # type: ignore[union-attr,arg-type]
            return net(x, t, labels)

    def end(self, net: Preconditioned) -> None:
        self.slow.follow(net)
        self.slow_embedding.follow(self.embedding)


@contextlib.contextmanager
def _moved(layer: nn.Module, offset: Tensor) -> Iterator[None]:
    """Within the block, `offset` is added to the output of `layer`."""
    handle = layer.register_forward_hook(lambda module, inputs, output: output + offset.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()
