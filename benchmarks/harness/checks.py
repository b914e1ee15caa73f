"""Whether outputs may be timed at all: compared with the definition, on memory that was poisoned before.

Operators obey the rule of tests/parity.py: an error of at most twice that of eager PyTorch in the same type, both
against float64, for every output and gradient. Networks obey the same rule in norm, against the float32 definition, and
training steps in the norm of every gradient by itself.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
_POISON_BYTES = 1 << 30
_ORDER, _MANY, _NOISE = 8.0, 16, 2.0


class MismatchError(Exception):
    """Outputs that differ from the definition's by more than they may."""


class UncheckedError(Exception):
    """Outputs that nothing sharp can be said of here: plain PyTorch itself is too far from the definition."""


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        return [t for part in outputs for t in tensors(part)]
    return []


@contextlib.contextmanager
def poisoned(device: torch.device, like: Sequence[Tensor] = ()) -> Iterator[None]:
    """Fresh memory holds NaN inside, so that an element that a kernel forgets to write shows.

    On a GPU the allocator's free blocks are filled, those of the sizes of `like` and a large one. On a CPU, where
    large blocks come from the system as zeros, PyTorch itself fills what it allocates.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        sizes = [t.numel() * t.element_size() for t in like] + [min(_POISON_BYTES, free // 4)]
        blocks = [torch.full((max(size // 4, 1),), float("nan"), device=device) for size in sizes]
        del blocks
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def spoil(call: Any) -> bool:
    """Fill the outputs that `call` writes anew at every replay of a graph with NaN; whether it has any.

    Right ones of an earlier replay would hide an element that this one forgets.
    """
    own = tensors(getattr(call, "own_outputs", ()))
    with torch.no_grad():
        for tensor in own:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return bool(own)


class Accuracy:
    """The rule for operators: `truth` in float64, `eager` the same by eager PyTorch in the type that is timed."""

    def __init__(self, truth: Any, eager: Any, factor: float = FACTOR) -> None:
        self._truth, eager_tensors = tensors(truth), tensors(eager)
        self._factor = factor
        self._eager_errors = [_max_error(e, t) for e, t in zip(eager_tensors, self._truth, strict=True)]
        self._like = [(e.shape, e.dtype) for e in eager_tensors]
        self.outputs = eager_tensors

    def check(self, outputs: Any) -> None:
        """Raise MismatchError unless every tensor is as accurate as eager PyTorch's, times the factor."""
        found = tensors(outputs)
        _check_alike([(t.shape, t.dtype) for t in found], self._like)
        for index, (tensor, truth, eager_error) in enumerate(zip(found, self._truth, self._eager_errors, strict=True)):
            error = _max_error(tensor, truth)
            unit = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
            limit = self._factor * eager_error + unit * float(truth.abs().max()) if truth.numel() else 0.0
            if not error <= limit:
                raise MismatchError(f"result {index}: error {error:.3e}, and at most {limit:.3e} is allowed")


class Closeness:
    """The rule for networks, on the norm of the difference from the float32 definition, relative to its norm.

    With `eager`, what plain PyTorch returns in the types that are timed, at most twice its error is allowed (or `floor`
    if that is more), and never as much as the definition's own norm. Without, `floor` is the limit.
    """

    def __init__(self, expected: Any, floor: float, eager: Any = None) -> None:
        self._expected = [t.detach().float() for t in tensors(expected)]
        self._limit = floor
        if eager is not None:
            self._limit = min(max(floor, FACTOR * self.error(eager)), 0.99)

    def error(self, outputs: Any) -> float:
        """The relative difference of all tensors together; raises MismatchError if there are others than expected."""
        found = tensors(outputs)
        _check_alike([t.shape for t in found], [t.shape for t in self._expected])
        difference = _norm([a.detach().float() - b for a, b in zip(found, self._expected, strict=True)])
        return difference / max(_norm(self._expected), 1e-30)

    def check(self, outputs: Any) -> None:
        """Raise MismatchError unless all tensors together are close enough."""
        error = self.error(outputs)
        if not error <= self._limit:
            raise MismatchError(f"differs by {error:.3g} of the norm, and at most {self._limit:.3g} is allowed")


class Gradients:
    """The rule for training steps: each gradient by itself and all together, against the definition's in float32.

    A gradient may be off by twice what plain PyTorch's is in the same types, or by `floor` of its norm if that is more.
    Plain PyTorch's is its error of this gradient, or of all together if that is more: nobody is held to its luck. Where
    a gradient may be off by more than `most`, its size has to be of the order of plain PyTorch's as well (a factor of
    `_ORDER`) or of the definition's, or zero would pass; where it may be off by `_NOISE` times its norm, it is rounding
    alone, and the size is all that is compared. Gradients of fewer than `_MANY` elements are held together. Those that
    are a millionth of the largest or less, such as of biases before a batch norm, are rounding themselves: they are
    held against that size, and may be zero.
    """

    def __init__(self, expected: Any, floor: float, eager: Any, *, most: float = 0.3) -> None:
        self._expected = [t.detach().float().clone() for t in tensors(expected)]
        norms = [float(t.norm()) for t in self._expected]
        self._least = max(1e-6 * max(norms, default=0.0), 1e-30)
        self._groups = _groups(self._expected)
        found = [t.detach().float() for t in tensors(eager)]
        errors = self._errors(found)
        self._limits = [max(floor, FACTOR * max(error, errors[-1])) for error in errors]
        self._sizes = [self._allowed_sizes(found, group) for group in self._groups]
        self._most = most
        compared = {
            i for group, limit in zip(self._groups[:-1], self._limits, strict=False) if limit <= most for i in group
        }
        self.in_value = len(compared)
        """How many of the gradients are compared in value alone."""

    def __len__(self) -> int:
        return len(self._expected)

    def check(self, outputs: Any) -> None:
        """Raise MismatchError unless every gradient is close enough."""
        found = [t.detach().float() for t in tensors(outputs)]
        for group, error, limit in zip(self._groups, self._errors(found), self._limits, strict=True):
            if limit < _NOISE and not error <= limit:
                raise MismatchError(
                    f"{_named(group)} differs by {error:.3g} of its norm, and at most {limit:.3g} is allowed"
                )
        self.check_sizes(found, above=self._most)

    def check_sizes(self, outputs: Any, *, above: float = 0.0) -> None:
        """Raise MismatchError unless the gradients that may be off by more than `above` are of plain PyTorch's size."""
        found = [t.detach().float() for t in tensors(outputs)]
        _check_alike([t.shape for t in found], [t.shape for t in self._expected])
        for group, limit, (least, most) in zip(self._groups, self._limits, self._sizes, strict=True):
            norm = _norm([found[i] for i in group])
            if limit > above and not least <= norm <= most:
                raise MismatchError(f"{_named(group)} has norm {norm:.3g} and not one of {least:.3g} to {most:.3g}")

    def require_values(self) -> None:
        """Raise UncheckedError if fewer than half of the gradients can be compared in value."""
        if 2 * self.in_value < len(self):
            raise UncheckedError(
                f"of {len(self)} gradients {len(self) - self.in_value} may differ by more than {self._most:g} of "
                "their norm in plain PyTorch already"
            )

    def _allowed_sizes(self, eager: list[Tensor], group: list[int]) -> tuple[float, float]:
        """The least and the largest norm of a group of gradients."""
        norms = [_norm([t[i] for i in group]) for t in (eager, self._expected)]
        if norms[1] <= self._least:
            return 0.0, max(norms[0], self._least) * _ORDER
        return min(norms) / _ORDER, max(norms) * _ORDER

    def _errors(self, found: list[Tensor]) -> list[float]:
        """Of every group, relative to its norm."""
        _check_alike([t.shape for t in found], [t.shape for t in self._expected])
        errors = []
        for group in self._groups:
            difference = _norm([found[i] - self._expected[i] for i in group])
            errors.append(difference / max(_norm([self._expected[i] for i in group]), self._least))
        return errors


def _groups(gradients: Sequence[Tensor]) -> list[list[int]]:
    """Each large one by itself, the small ones together; at last all."""
    small = [i for i, g in enumerate(gradients) if g.numel() < _MANY]
    large = [[i] for i, g in enumerate(gradients) if g.numel() >= _MANY]
    return [*large, *([small] if small else []), list(range(len(gradients)))]


def _named(group: list[int]) -> str:
    return f"gradient {group[0]}" if len(group) == 1 else f"what gradients {', '.join(map(str, group))} make together"


def _check_alike(found: list[Any], expected: list[Any]) -> None:
    if len(found) != len(expected):
        raise MismatchError(f"{len(found)} tensors instead of {len(expected)}")
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            raise MismatchError(f"result {index} is {one} instead of {other}")


def _max_error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN, which fails every comparison, if there is one."""
    return float((found.double() - truth.double()).abs().max()) if found.numel() else 0.0


def _norm(parts: Sequence[Tensor]) -> float:
    return float(torch.stack([part.norm() for part in parts]).norm()) if parts else 0.0
