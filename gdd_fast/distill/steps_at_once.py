"""The G and D steps of an iteration at the same time on a CPU (`--engine threads`).

One thread handles the generator: backward through its loss, Adam, then forward to the next images and their features.
Meanwhile the other runs the heads' forward and backward, and updates them once the first thread's backward is done.
They meet again when the heads see the next images. Results equal those of one step after the other.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdd_fast.distill.adversary import Adversary, Features, logged
from gdd_fast.training.optimizer import StepGuard
from gdd_fast.training.two_threads import TwoThreads

Place = tuple[Tensor, dict[str, Any]]
"""The states of the random number generator and of the stream of real images."""


@dataclass(frozen=True)
class Drawn:
    """The inputs of an iteration, and the place they were drawn from."""

    real: Tensor
    labels: Tensor | None
    fakes: "Future[Features]"
    """Features of the generator's images, with their graph."""
    place: Place


class StepsAtOnce:
    """Iterations whose inputs are drawn while the previous iteration ends.

    `guards` are those of G and D. `place` returns the place of the next draw; `read` draws real images in [-1, 1] and
    labels, `draw` latents. `make` returns the features of the images generated from latents and labels.
    """

    def __init__(
        self,
        adversary: Adversary,
        guards: tuple[StepGuard, StepGuard],
        place: Callable[[], Place],
        read: Callable[[], tuple[Tensor, Tensor | None]],
        draw: Callable[[], Tensor],
        make: Callable[[Tensor, Tensor | None], Features],
    ) -> None:
        self.two = TwoThreads()
        self._adversary, (self._g_guard, self._d_guard) = adversary, guards
        self._place, self._read, self._draw, self._make = place, read, draw, make
        self._next: Drawn | None = None

    def place(self) -> Place:
        """The place that the next iteration is drawn from: where a saved run resumes."""
        return self._place() if self._next is None else self._next.place

    def forget(self) -> None:
        """Have the next iteration drawn again: weights, random numbers or the stream are about to change."""
        if self._next is not None:
            self._next.fakes.result()
            self._next = None

    def next(self) -> Drawn:
        """The inputs of the next `take`."""
        if self._next is None:
            place = self._place()
            real, labels = self._read()
            z = self._draw()
            self._next = Drawn(real, labels, self.two.start(lambda: self._make(z, labels)), place)
        return self._next

    def take(self) -> dict[str, Tensor]:
        """Take the G and D steps on `next`; returns values for the log. Raises as `StepGuard.begin`."""
        for guard in (self._g_guard, self._d_guard):
            guard.begin()
        now, self._next = self.next(), None
        adversary = self._adversary
        adversary.train_heads(False)
        real = adversary.seen(now.real)
        fakes = now.fakes.result()
        loss_g = adversary.fooled(fakes, now.labels)

        def back() -> Tensor:
            loss_g.backward()
            return self._g_guard.apply()

        norm_g = self.two.start(back)
        self.next()  # queued behind `back`, so with the new weights
        adversary.train_heads(True)
        loss_d, logits = adversary.told_apart([[x.detach() for x in maps] for maps in fakes], real, now.labels)
        loss_d.backward()
        values = {"loss_g": loss_g.detach(), "loss_d": loss_d.detach()}
        values["grad_norm_g"] = norm_g.result()  # its backward reads the heads' weights, which change next
        values["grad_norm_d"] = self._d_guard.apply()
        for guard in (self._g_guard, self._d_guard):
            guard.end()
        return values | logged(logits)

    def close(self) -> None:
        """Wait for the other thread and end it."""
        self.two.close()
