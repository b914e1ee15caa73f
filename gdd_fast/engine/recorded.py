"""A network on a CPU, operator by operator, without Python between them from the third call of a shape on.

Which operators a folded network calls, and on what, depends on the shapes alone. The second call of a shape (the first
prepares weights) notes them; later ones repeat the notes from C++ (csrc/recording.cpp), on new tensors, so that results
are the caller's and threads do not disturb each other. Python's part is a fifth of a call where maps are 16x16 pixels.

A network with hooks, or one that is called under a dispatch mode, runs as it is.
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
"""PyTorch keeps whether a dispatch mode is on for the process: two threads that leave theirs in the order in which they
entered would leave it on for good, and every operator on its slower way."""

Replay = tuple[Callable[[list[Tensor]], list[Tensor] | None], TreeSpec]


class Recorded:
    """`network(latents, rows)`, and what a `Finish` makes of its images; recordings of the last shapes are kept."""

    def __init__(self, network: nn.Module, limit: int = MAX_RECORDINGS) -> None:
        if limit < 1:
            raise ConfigError(f"at least 1 recording is kept, not {limit}")
        self.network = network
        self.limit = limit
        self._modules = list(network.modules())
        # by kind of call: how many there were, and the recording, for good None where it cannot be repeated
        self._replays: OrderedDict[Any, tuple[int, Replay | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, latents: Tensor, rows: Tensor | None, finish: Callable[[Tensor], Any] | None = None) -> Any:
        inputs = [latents] if rows is None else [latents, rows]
        if torch.is_grad_enabled() or self._hooked():
            return self._run(inputs, finish)
        key = (*((t.shape, t.stride(), t.dtype) for t in inputs), finish, torch.get_num_threads())
        with self._lock:
            calls, replay = self._replays.pop(key, (0, None))
            self._replays[key] = calls + 1, replay  # the last used is the last to go
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
    """Notes every operator that is called."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.recording: Any = extension().Recording(inputs)  # type: ignore[union-attr]
        self.complete = True
        """Whether all of them can be repeated."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        added = self.complete and self.recording.add(schema.name, schema.overload_name, args, kwargs or {}, result)
        self.complete = bool(added)
        return result
