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

from gdd_fast.data import BatchStream
from gdd_fast.distill.adversary import Adversary, Features, logged
from gdd_fast.training.optimizer import StepGuard
from gdd_fast.training.random_state import RandomState
from gdd_fast.training.two_threads import TwoThreads


@dataclass(frozen=True)
class _Drawn:
    """What an iteration is of, and where the random numbers and the stream stood before."""

    real: Tensor
    labels: Tensor | None
    fakes: "Future[Features]"
    """Of the generator's images, with their graph."""
    random: Tensor
    stream: dict[str, Any]


class StepsAtOnce:
    """Iterations that are each drawn while the one before ends.

    `read` gives real images in [-1, 1] and labels of the `stream`, `draw` latents of `random`, and `make` the features
    of the images of latents and labels. `guards` are of G and of D.
    """

    def __init__(
        self,
        adversary: Adversary,
        guards: tuple[StepGuard, StepGuard],
        read: Callable[[], tuple[Tensor, Tensor | None]],
        draw: Callable[[], Tensor],
        make: Callable[[Tensor, Tensor | None], Features],
        stream: BatchStream,
        random: RandomState,
    ) -> None:
        self.two = TwoThreads()
        self._adversary, (self._g_guard, self._d_guard) = adversary, guards
        self._read, self._draw, self._make = read, draw, make
        self._stream, self._random = stream, random
        self._next: _Drawn | None = None

    def drawn_from(self) -> tuple[Tensor, dict[str, Any]]:
        """The states of `random` and `stream` that the next iteration is drawn from: where a saved run goes on."""
        if self._next is not None:
            return self._next.random, self._next.stream
        return self._random.generator.get_state(), self._stream.state_dict()

    def forget(self) -> None:
        """Draw the next iteration anew: weights, random numbers or the stream are about to be others."""
        if self._next is not None:
            self._next.fakes.result()
            self._next = None

    def next(self) -> _Drawn:
        """What the next `take` is of."""
        if self._next is None:
            before = self._random.generator.get_state(), self._stream.state_dict()
            real, labels = self._read()
            z = self._draw()
            self._next = _Drawn(real, labels, self.two.start(lambda: self._make(z, labels)), *before)
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
