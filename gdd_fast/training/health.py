"""Signs in the metrics that a run has gone wrong even though all its numbers are finite.

- `discriminator_collapsed`: the discriminator gives every image the same verdict. In this tick and the one before, its
logits have the right sign for more than 99 % of the images of one kind, real or generated, and for less than 1 % of the
other.
- `discriminator_saturated`: it tells all images apart: more than 99.9 % of both kinds in this tick and the one before.
The generator can learn little more from it.
- `loss_ran_away`: the mean of a loss in this tick is not finite, or is more than 10 times its median over the previous
10 ticks, once there are at least 3.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

COLLAPSED, SATURATED, RAN_AWAY = "discriminator_collapsed", "discriminator_saturated", "loss_ran_away"
_ACCURACIES = ("sign_accuracy_real", "sign_accuracy_fake")
_ONE_SIDED, _ALL = 0.99, 0.999
_TICKS, _FEWEST, _FACTOR = 10, 3, 10.0


def signs(before: Sequence[Mapping[str, Any]], now: Mapping[str, float]) -> dict[str, str]:
    """Which of these signs the metrics `now` show, given those of the ticks `before`, with a line about each.

    A sign whose metrics the run does not have is never found.
    """
    found = {}
    if before and all(_one_sided(line) for line in (before[-1], now)):
        real, fake = (now[name] for name in _ACCURACIES)
        kind = "real" if real > fake else "generated"
        found[COLLAPSED] = f"the discriminator has collapsed: it takes every image to be {kind}"
    if before and all(_tells_all(line) for line in (before[-1], now)):
        found[SATURATED] = "the discriminator tells all images apart: the generator learns little from it"
    for name, value in now.items():
        if not name.startswith("loss"):
            continue
        known = [line[name] for line in before[-_TICKS:] if isinstance(line.get(name), int | float)]
        usual = median(map(abs, known)) if len(known) >= _FEWEST else None
        if not abs(value) <= (float("1e300") if usual is None else _FACTOR * usual):
            before_it = "" if usual is None else f", where it was {usual:.3g} before"
            found[RAN_AWAY] = f"{name} ran away: {value:.3g}{before_it}"
    return found


def applicable(now: Mapping[str, float]) -> tuple[str, ...]:
    """The signs that a run with these metrics can show."""
    of_discriminator = (COLLAPSED, SATURATED) if all(name in now for name in _ACCURACIES) else ()
    return (*of_discriminator, RAN_AWAY) if any(name.startswith("loss") for name in now) else of_discriminator


def _accuracies(line: Mapping[str, Any]) -> list[float]:
    values = [line.get(name) for name in _ACCURACIES]
    return [value for value in values if isinstance(value, int | float)]


def _one_sided(line: Mapping[str, Any]) -> bool:
    values = _accuracies(line)
    return len(values) == 2 and max(values) > _ONE_SIDED and min(values) < 1 - _ONE_SIDED


def _tells_all(line: Mapping[str, Any]) -> bool:
    values = _accuracies(line)
    return len(values) == 2 and min(values) > _ALL
