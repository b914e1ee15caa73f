"""A network on a CPU, operator by operator, but without Python between operators from the third call of a shape on.

Which operators a folded network calls, and on what, depends on the shapes alone. The second call of a shape records
them (the first prepares weights); later calls replay the recording from C++ (csrc/recording.cpp), on new tensors, so
that the caller owns the results and threads do not interfere. For maps of 16x16 pixels, Python takes a fifth of a call.

A network with hooks, or called with gradients enabled or under a dispatch mode, runs as it is.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gdd_fast.backend import extension
from gdd_fast.errors import ConfigError

MAX_RECORDINGS = 8

_ONE_AT_A_TIME = threading.Lock()
"""PyTorch keeps one flag per process for whether a dispatch mode is on: two threads that leave their modes in the order
in which they entered would leave it on for good, and every operator on its slower path."""

Replay = tuple[Callable[[list[Tensor]], list[Tensor] | None], TreeSpec]


class Recorded:
    """`network(latents, rows)`, and what a `Finish` makes of its images; the last `limit` recordings are kept."""

    def __init__(self, network: nn.Module, limit: int = MAX_RECORDINGS) -> None:
        if limit < 1:
            raise ConfigError(f"limit must be at least 1, not {limit}")
        self.network = network
        self.limit = limit
        self._modules = list(network.modules())
        # by kind of call: how many calls there were, and the recording; None forever if it cannot be replayed
        self._replays: OrderedDict[Any, tuple[int, Replay | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, latents: Tensor, rows: Tensor | None, finish: Callable[[Tensor], Any] | None = None) -> Any:
        inputs = [latents] if rows is None else [latents, rows]
        if torch.is_grad_enabled() or self._hooked():
            return self._run(inputs, finish)
        key = (*((t.shape, t.stride(), t.dtype) for t in inputs), finish, torch.get_num_threads())
        with self._lock:
            calls, replay = self._replays.pop(key, (0, None))
            self._replays[key] = calls + 1, replay  # the most recently used is evicted last
            if len(self._replays) > self.limit:
                self._replays.popitem(last=False)
        if replay is not None:
            again, spec = replay
            results = again(inputs)
            return self._run(inputs, finish) if results is None else tree_unflatten(results, spec)
        if calls != 1:
            return self._run(inputs, finish)
        result, replay = self._record(inputs, finish)
        with self._lock:
            if key in self._replays:
                self._replays[key] = calls + 1, replay
        return result

    def _run(self, inputs: list[Tensor], finish: Callable[[Tensor], Any] | None) -> Any:
        images = self.network(inputs[0], inputs[1] if len(inputs) > 1 else None)
        return images if finish is None else finish(images)

    def _record(self, inputs: list[Tensor], finish: Callable[[Tensor], Any] | None) -> tuple[Any, Replay | None]:
        recorder = _Recorder(inputs)
        with _ONE_AT_A_TIME, recorder:
            result = self._run(inputs, finish)
        results, spec = tree_flatten(result)
        return result, (recorder.recording, spec) if recorder.complete and recorder.recording.finish(results) else None

    def _hooked(self) -> bool:
        return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) or any(
            m._forward_hooks or m._forward_pre_hooks for m in self._modules
        )


class _Recorder(TorchDispatchMode):
    """Records every operator that is called."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.recording: Any = extension().Recording(inputs)  # type: ignore[union-attr]
        self.complete = True
        """Whether all of them can be replayed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        added = self.complete and self.recording.add(schema.name, schema.overload_name, args, kwargs or {}, result)
        self.complete = bool(added)
        return result
