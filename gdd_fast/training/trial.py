"""A recording proves itself before it is used: its first replays are held against the step as it is.

Before each of the first `CHECKS` replays the step runs eagerly. Then everything that it changed is put back, random
numbers too, and the replay starts from the same state with the same inputs. The second replay has other inputs, random
numbers and counts than the recording was made with: what a graph froze in, or did not refill, differs there at the
latest. If a recording raises or differs, the state is that of the eager call, and the run goes on eagerly.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gdd_fast.training.random_state import RandomState

CHECKS = 2
VALUES, CHANGE = 0.02, 0.1
"""How far a replay's logged values may be off, and all that it changed, in norm against the change of the eager call.
Both run the same kernels; some of those add up in any order, and Adam makes a whole step of a sign."""

Values = dict[str, Tensor]


class Trial:
    """`state` gives every tensor that a step may change, the same ones in the same order each time.

    Copies are in host memory: three of the state while a replay is checked.
    """

    def __init__(self, state: Callable[[], Iterable[Tensor]], random: RandomState) -> None:
        self._state, self._random = state, random

    def run(self, eager: Callable[[], Values], replay: Callable[[], Values]) -> tuple[Values, str | None]:
        """One step, taken eagerly and again by `replay`: its values, and why the replay is not to be used, or None."""
        before, drawn = self._copies(), self._random.generator.get_state()
        expected = {name: value.detach().clone() for name, value in eager().items()}
        after, drawn_after = self._copies(), self._random.generator.get_state()
        self._put_back(before)
        self._random.generator.set_state(drawn)
        try:
            found = replay()
        except RuntimeError as error:  # torch's own, out of memory among them, whatever forbids a capture
            reason: str | None = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            reason = _difference(expected, found, before, after, self._state())
        if reason is not None:
            self._put_back(after)
            for t in self._state():
                t.grad = None  # a step leaves none, and a recording that raised may
            self._random.renew(drawn_after)
        return expected, reason

    def _copies(self) -> list[Tensor]:
        return [t.detach().to("cpu", copy=True) for t in self._state()]

    @torch.no_grad()
    def _put_back(self, copies: list[Tensor]) -> None:
        for t, copy in zip(self._state(), copies, strict=True):
            t.detach().copy_(copy)


def _difference(
    expected: Values, found: Values, before: list[Tensor], after: list[Tensor], state: Iterable[Tensor]
) -> str | None:
    for name, value in expected.items():
        if not torch.allclose(found[name].double(), value.double(), rtol=VALUES, atol=1e-3, equal_nan=True):
            return f"{name} is {found[name].item():.6g} and {value.item():.6g} eagerly"
    moved = off = 0.0
    for was, now, t in zip(before, after, state, strict=True):
        replayed = t.detach().cpu()
        if not torch.equal(now.isfinite(), replayed.isfinite()):
            return "it makes values infinite or NaN that are not so eagerly, or the other way round"
        moved += _squares(now, was)
        off += _squares(now, replayed)
    if off**0.5 > CHANGE * moved**0.5:
        return f"what it changes is off by {off**0.5:.3g} where the step moves {moved**0.5:.3g}"
    return None


def _squares(a: Tensor, b: Tensor) -> float:
    """The sum of the squares of their difference, where both are finite."""
    difference = a.double() - b.double()
    return difference[difference.isfinite()].square().sum().item()
