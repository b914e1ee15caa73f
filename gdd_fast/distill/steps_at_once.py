"""The G and the D step of an iteration at the same time on a CPU (`--engine threads`).

One thread goes the generator's way: back through its loss, Adam, and forward to the next images and their features.
The other goes through the heads meanwhile, and changes them when the first is back. They meet again where these look at
the next images. Results are those of one step after the other.
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
"""The states of the generator of random numbers and of the stream of real images."""


@dataclass(frozen=True)
class Drawn:
    """What an iteration is of, and the place it was drawn from."""

    real: Tensor
    labels: Tensor | None
    fakes: "Future[Features]"
    """Of the generator's images, with their graph."""
    place: Place


class StepsAtOnce:
    """Iterations that are each drawn while the one before ends.

    `guards` are of G and of D. `place` says where the next are drawn from: real images in [-1, 1] and labels, which
    `read` gives, and latents, which `draw` does. `make` gives the features of the images of latents and labels.
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
        """The one that the next iteration is drawn from: where a saved run goes on."""
        return self._place() if self._next is None else self._next.place

    def forget(self) -> None:
        """Draw the next iteration anew: weights, random numbers or the stream are about to be others."""
        if self._next is not None:
            self._next.fakes.result()
            self._next = None

    def next(self) -> Drawn:
        """What the next `take` is of."""
        if self._next is None:
            place = self._place()
            real, labels = self._read()
            z = self._draw()
            self._next = Drawn(real, labels, self.two.start(lambda: self._make(z, labels)), place)
        return self._next

    def take(self) -> dict[str, Tensor]:
        """The G and the D step of `next`; values for the log. Raises as `StepGuard.begin`."""
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
        self.next()  # behind it, with the new weights
        adversary.train_heads(True)
        loss_d, logits = adversary.told_apart([[x.detach() for x in maps] for maps in fakes], real, now.labels)
        loss_d.backward()
        values = {"loss_g": loss_g.detach(), "loss_d": loss_d.detach()}
        values["grad_norm_g"] = norm_g.result()  # its way back was through the weights that change now
        values["grad_norm_d"] = self._d_guard.apply()
        for guard in (self._g_guard, self._d_guard):
            guard.end()
        return values | logged(logits)

    def close(self) -> None:
        """Wait for the other thread and end it."""
        self.two.close()
