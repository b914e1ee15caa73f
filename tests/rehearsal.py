"""A recorder for any device that replays a step operator by operator, and finds what a CUDA graph would get wrong.

A CUDA graph runs the kernels that it was captured with, on the addresses and with the numbers of the capture. So does
`Rehearsal` with PyTorch's operators, below autograd: it keeps their order, their arguments and their results' memory,
and a replay calls them again with just these. After a replay all memory of results and inputs is poisoned (NaN, or the
least integer), so that nothing is right by having been right before. It raises `CaptureError` for

- an operator for which the host waits for the device (`item`, `nonzero`, copies between devices), see `forbid_waiting`;
- a number that was another in the call before the recording: it would be frozen in the graph;
- memory from outside the step that has been given up since: nobody would fill it again;
- memory of the step that outlives it without being returned: the next graph of the pool overwrites it.

All results are kept at once and every operator is called from Python: for tests, on small networks.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from gdd_fast.training.captured_steps import Inputs, Step

_WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}
)


class CaptureError(RuntimeError):
    """A step that cannot be captured in a graph, or would not be the same in one."""


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in _WAITING:
            raise CaptureError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        # numbers of the host may enter a kernel; other memory of its cannot, nor be copied to or from
        copies = func._schema.name in ("aten::_to_copy", "aten::copy_")
        devices = {t.device.type for t in _tensors((args, kwargs)) if t.dim() or copies} | {
            t.device.type for t in _tensors(result)
        }
        if "cpu" in devices and len(devices) > 1:
            raise CaptureError(f"{func} copies between {' and '.join(sorted(devices))}")
        return result


def forbid_waiting() -> TorchDispatchMode:
    """A context that raises `CaptureError` where the host would wait for the device; for fake tensors too."""
    return _Watching()


class Rehearsal:
    """The recorder of the module's description; `warm_up` calls of each step run as they are, the last one watched."""

    def __init__(self, warm_up: int = 2) -> None:
        self.warm_up = warm_up
        self.replays = 0
        self._numbers: dict[Any, list[tuple[Any, list[Any]]]] = {}

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        with _Recording() as recording:
            values = step(*inputs)
        self._numbers[_key(step, inputs)] = recording.numbers
        return values

    def record(self, step: Step, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """Runs the step; so the first replay only hands out what it returned."""
        with _Recording() as recording:
            values = step(*inputs)
        _check_numbers(self._numbers[_key(step, inputs)], recording.numbers)
        _check_survivors(recording, values)
        memory = [t for t, _ in recording.made.values()] + [t for t in inputs if t is not None]
        calls = recording.finished(inputs)
        values = {name: value.detach() for name, value in values.items()}
        first = True

        def replay() -> dict[str, Tensor]:
            nonlocal first
            with torch.no_grad():
                if not first:
                    for call in calls:
                        call()
                    self.replays += 1
                first = False
                result = {name: value.clone() for name, value in values.items()}
                for t in memory:
                    _poison(t)
            return result

        return replay


class _Recording(_Watching):
    """What is called, and whose memory it is: made by the step, or found."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[Any, list[Any]]] = []
        self.made: dict[int, tuple[Tensor, Any]] = {}
        """By memory: a tensor that keeps it, and the operator that made it."""
        self.results: list[tuple[weakref.ref, Any]] = []
        self._calls: list[tuple[Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "profiler":
            return result  # marks that an optimizer makes around its steps
        given = (args, kwargs or {})
        self.numbers.append((func, [value for value in tree_flatten(given)[0] if not isinstance(value, Tensor)]))
        outside = {_memory(t) for t in _tensors(given)} - self.made.keys()
        fresh = []
        for index, t in enumerate(tree_flatten(result)[0]):
            if not isinstance(t, Tensor) or _memory(t) in outside:
                continue
            if _memory(t) not in self.made:
                self.made[_memory(t)] = t.detach(), func
                fresh.append((index, t.detach()))
            self.results.append((weakref.ref(t), func))
        # detached, or they would keep autograd's graph
        self._calls.append((func, tree_map_only(Tensor, torch.detach, given), fresh))
        return result

    def finished(self, inputs: Inputs) -> list[Callable[[], None]]:
        """The calls anew, each without a hold on memory that is neither the step's nor its inputs'."""
        own = self.made.keys() | {_memory(t) for t in inputs if t is not None}
        calls = []
        for func, given, fresh in self._calls:
            given = tree_map_only(Tensor, lambda t, func=func: t if _memory(t) in own else _Found(t, func), given)
            calls.append(_again(func, given, fresh))
        self._calls.clear()
        return calls


def _again(func: Any, given: Any, fresh: list[tuple[int, Tensor]]) -> Callable[[], None]:
    if "empty" in func._schema.name:
        return lambda: None  # the memory is there, and poisoned

    def call() -> None:
        args, kwargs = tree_map_only(_Found, _Found.tensor, given)
        results = tree_flatten(func(*args, **kwargs))[0]
        for index, memory in fresh:
            memory.copy_(results[index])

    return call


class _Found:
    """A tensor in memory that others own, and may give up."""

    def __init__(self, t: Tensor, func: Any) -> None:
        self._storage = StorageWeakRef(t.untyped_storage())
        self._view = t.storage_offset(), t.shape, t.stride()
        self._dtype, self._func = t.dtype, func

    def tensor(self) -> Tensor:
        storage = None if self._storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise CaptureError(f"{self._func} reads {self._dtype} {tuple(self._view[1])} that nobody holds any more")
        return torch.empty(0, dtype=self._dtype, device=storage.device).set_(storage, *self._view)


def _check_numbers(before: list[tuple[Any, list[Any]]], now: list[tuple[Any, list[Any]]]) -> None:
    for (func, was), (other, value) in zip(before, now, strict=False):
        if func is not other:
            raise CaptureError(f"a step runs {func} in one call and {other} in the next")
        if was != value:
            changed = next((a, b) for a, b in zip(was, value, strict=False) if a != b)
            raise CaptureError(f"{func} is given {changed[0]} in one call and {changed[1]} in the next")
    if len(before) != len(now):
        raise CaptureError(f"a step runs {len(before)} operators in one call and {len(now)} in the next")


def _check_survivors(recording: _Recording, values: dict[str, Tensor]) -> None:
    returned = {_memory(t) for t in values.values()}

    def surviving() -> list[str]:
        alive = [(t, func) for reference, func in recording.results if (t := reference()) is not None]
        return [f"{func} {tuple(t.shape)}" for t, func in alive if _memory(t) in recording.made.keys() - returned]

    if surviving():
        gc.collect()  # cycles keep memory too, but not for long
        if found := surviving():
            raise CaptureError(f"memory outlives the step: {', '.join(found[:3])}")


def _key(step: Step, inputs: Inputs) -> Any:
    return step, tuple(None if t is None else t.shape for t in inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _poison(t: Tensor) -> None:
    if t.dtype == torch.bool:
        t.fill_(True)
    else:
        t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).min)
