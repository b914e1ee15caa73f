"""Adam as GDD uses it, and the guard that lets no update through whose gradients are not finite."""

from collections.abc import Iterable

import torch
from torch import nn

from gdd_fast.distill.distributed import World
from gdd_fast.errors import DivergedError


def make_adam(params: Iterable[nn.Parameter], lr: float, lazy_interval: int = 0) -> torch.optim.Adam:
    """Adam with betas (0, 0.99), eps 1e-8, over the parameters that train.

    `lazy_interval` > 0 adds the correction for a regulariser that takes one step of its own every that many
    iterations: `c = interval / (interval + 1)`, learning rate `lr * c`, `beta2 ** c` (Karras et al. 2020, appendix B).
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    params = [p for p in params if p.requires_grad]
    return torch.optim.Adam(params, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)


class StepGuard:
    """Averages the gradients over the ranks, then steps the optimizer only if every one of them is finite.

    A step that is not applied is counted in `skipped` and in `skipped_in_row`; nothing is zeroed or clipped.

    Args:
        name: of the step, for the error's message; steps of several kinds may share an optimizer.
        limit: skipped steps in a row that end the run.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, world: World, limit: int) -> None:
        self.name, self.optimizer, self.limit = name, optimizer, limit
        self._world = world
        self.skipped = 0
        self.skipped_in_row = 0

    def step(self) -> bool:
        """Apply the accumulated gradients and clear them; False if they were not finite and nothing changed.

        Raises:
            DivergedError: `limit` steps in a row were skipped.
        """
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._world.average_(grads)
        # Averaged first, so that the ranks agree: one that is not finite makes the mean so. The largest magnitude, as
        # NaN and infinity survive it and it cannot overflow as a sum of squares can.
        finite = bool(torch.stack(torch._foreach_norm(grads, ord=float("inf"))).isfinite().all())
        if finite:
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_row >= self.limit:
            raise DivergedError(
                f"{self.limit} {self.name} steps in a row had gradients that were not finite. The state is saved; "
                "lower the learning rate or use --g-precision fp32 --d-precision fp32"
            )
        return finite
