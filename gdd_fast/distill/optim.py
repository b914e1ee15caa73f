"""Adam as GDD uses it, and the guard that lets no update through whose gradients are not finite."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.distill.adam_ema import AdamEma
from gdd_fast.distill.distributed import World
from gdd_fast.errors import DivergedError


def make_adam(
    params: Iterable[nn.Parameter],
    lr: float,
    lazy_interval: int = 0,
    *,
    averages: Mapping[nn.Parameter, Tensor] | None = None,
    backend: Backend = "auto",
) -> AdamEma:
    """Adam with betas (0, 0.99), eps 1e-8, over the parameters that train; `averages` as of `AdamEma`.

    `lazy_interval` > 0 adds the correction for a regulariser that takes one step of its own every that many
    iterations: `c = interval / (interval + 1)`, learning rate `lr * c`, `beta2 ** c` (Karras et al. 2020, appendix B).
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    params = [p for p in params if p.requires_grad]
    return AdamEma(params, lr * c, (0.0, 0.99**c), 1e-8, averages=averages, backend=backend)


class StepGuard:
    """Averages the gradients over the ranks, takes the optimizer's step, and ends a run that takes none any more.

    `AdamEma` leaves a step out, whole, if a gradient is not finite; nothing is zeroed or clipped. Here that is counted,
    in `skipped` and in `skipped_in_row`.

    Nothing waits for the device: the count of a step is copied to the host behind it and read when the next step of
    this guard is due, an iteration later, or when somebody asks. All ranks count alike, as they average first.

    Args:
        name: of the step, for the error's message; steps of several kinds may share an optimizer.
        limit: skipped steps in a row that end the run.
    """

    def __init__(self, name: str, optimizer: AdamEma, world: World, limit: int) -> None:
        self.name, self.optimizer, self.limit = name, optimizer, limit
        self._world = world
        self._count = torch.zeros_like(optimizer.skipped)
        self._on_host = torch.zeros((), dtype=torch.int64, pin_memory=self._count.is_cuda)
        self._copied = torch.cuda.Event() if self._count.is_cuda else None
        self._unread = False
        self._skipped = 0
        self._skipped_in_row = 0

    @property
    def skipped(self) -> int:
        """Steps left out in the whole run. Waits for the step before."""
        self._read()
        return self._skipped

    @property
    def skipped_in_row(self) -> int:
        """Steps left out since the last one that was taken. Waits for the step before."""
        self._read()
        return self._skipped_in_row

    def step(self) -> None:
        """Apply the accumulated gradients and clear them; nothing changes if they are not finite.

        Raises:
            DivergedError: the last `limit` steps were skipped; this one is not tried.
        """
        if self.skipped_in_row >= self.limit:
            raise DivergedError(f"{self.limit} {self.name} steps in a row had gradients that were not finite")
        # Averaged before they are looked at, so that the ranks agree: one that is not finite makes the mean so.
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._world.average_(p.grad for p in params)
        self.optimizer.step(skipped=self._count)
        self.optimizer.zero_grad(set_to_none=True)
        self._on_host.copy_(self._count, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._unread = True

    def restore(self, skipped: int) -> None:
        """Go on counting from a checkpoint's `skipped`."""
        self._count.fill_(skipped)
        self._skipped, self._skipped_in_row, self._unread = skipped, 0, False

    def _read(self) -> None:
        if not self._unread:
            return
        if self._copied is not None:
            self._copied.synchronize()
        skipped = int(self._on_host)
        self._skipped_in_row = self._skipped_in_row + 1 if skipped > self._skipped else 0
        self._skipped, self._unread = skipped, False
