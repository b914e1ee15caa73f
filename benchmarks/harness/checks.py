"""Whether outputs may be timed at all: compared with the definition, on memory that was poisoned before.

Operators obey the rule of tests/parity.py: an error of at most twice that of eager PyTorch in the same type, both
against float64, for every output and gradient. Networks and training steps obey the same rule in norm, against the
float32 definition.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
_POISON_BYTES = 1 << 30


class MismatchError(Exception):
    """Outputs that differ from the definition's by more than they may."""


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

    With `eager`, what plain PyTorch returns in the types that are timed, at most twice its error is allowed, or `floor`
    if that is more. Without, `floor` is the limit. Where the limit is as much as the definition's own norm, zeros would
    keep to it: there the norm has to be eager's within a factor of two besides. That is so for the gradient that comes
    back through EfficientNet-lite0 in bf16, most of which is rounding at its many ReLU6: float32 has to judge it.
    """

    def __init__(self, expected: Any, floor: float, eager: Any = None) -> None:
        self._expected = [t.detach().float() for t in tensors(expected)]
        self._limit, self._eager_norm = floor, None
        if eager is not None:
            self._limit = max(floor, FACTOR * self.error(eager))
            if self._limit >= 1:
                self._eager_norm = _norm([t.detach().float() for t in tensors(eager)])

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
        if self._eager_norm is not None:
            ratio = _norm([t.detach().float() for t in tensors(outputs)]) / max(self._eager_norm, 1e-30)
            if not 1 / FACTOR <= ratio <= FACTOR:
                raise MismatchError(f"differs by {error:.3g} of the norm, and is {ratio:.3g} times as large as eager's")


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
