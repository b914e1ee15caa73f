"""Checks a recording before it is used: its first replays are compared with the eager step.

Before each of the first `CHECKS` replays the step runs eagerly. Then everything it changed is restored, random numbers
included, and the replay starts from the same state with the same inputs. The second replay has other inputs, random
numbers and counts than the recording was made with: values that the graph froze or failed to refill show there at the
latest. If a recording raises or differs, the state becomes that of the eager call, and the run continues eagerly.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gdd_fast.training.random_state import RandomState

CHECKS = 2
VALUES, CHANGE = 0.02, 0.1
"""Allowed errors of a replay, relative: of logged values, and of all that it changed, in norm against the eager call's
change. Both run the same kernels, but some of these sum in any order, and Adam turns a sign into a whole step."""

Values = dict[str, Tensor]


class Trial:
    """`state` yields every tensor that a step may change, the same ones in the same order each time.

    Copies are in host memory: three copies of the state while a replay is checked.
    """

    def __init__(self, state: Callable[[], Iterable[Tensor]], random: RandomState) -> None:
        self._state, self._random = state, random

    def run(self, eager: Callable[[], Values], replay: Callable[[], Values]) -> tuple[Values, str | None]:
        """Take one step eagerly and again by `replay`: its values, and why not to use the replay, or None."""
        before, drawn = self._copies(), self._random.generator.get_state()
        expected = {name: value.detach().clone() for name, value in eager().items()}
        after, drawn_after = self._copies(), self._random.generator.get_state()
        self._put_back(before)
        self._random.generator.set_state(drawn)
        try:
            found = replay()
        except RuntimeError as error:  # raised by torch for whatever prevents a capture, out of memory included
            reason: str | None = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            reason = _difference(expected, found, before, after, self._state())
        if reason is not None:
            self._put_back(after)
            for t in self._state():
                t.grad = None  # a step leaves none, but a recording that raised may
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
            return f"{name} is {found[name].item():.6g}, but {value.item():.6g} eagerly"
    moved = off = 0.0
    for was, now, t in zip(before, after, state, strict=True):
        replayed = t.detach().cpu()
        if not torch.equal(now.isfinite(), replayed.isfinite()):
            return "it makes values infinite or NaN that are finite eagerly, or the other way round"
        moved += _squares(now, was)
        off += _squares(now, replayed)
    if off**0.5 > CHANGE * moved**0.5:
        return f"what it changes is off by {off**0.5:.3g} where the step moves {moved**0.5:.3g}"
    return None


def _squares(a: Tensor, b: Tensor) -> float:
    """The sum of the squared differences, where both are finite."""
    difference = a.double() - b.double()
    return difference[difference.isfinite()].square().sum().item()
