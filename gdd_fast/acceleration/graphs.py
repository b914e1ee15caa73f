"""`accelerate(net, engine="graph")`: forwards without gradients, captured once per kind of call and replayed.

The capture holds whatever the network's forward does, with gdd_fast's operators or its own. A CUDA graph repeats
kernels on the memory they were captured with, so before every replay a walk over the modules makes sure that the result
would be the same: no hooks, no training mode, the same modules, every parameter and buffer at the same address. Values
may change: replays read them anew. What a forward does in Python (counters, prints) is not repeated, and numbers and
functions that modules hold are those at the time of the capture.

Two calls are of one kind if their tensors agree in shape, strides and dtype, and their other arguments and the
precision settings are equal. A kind is captured at its `CALLS`-th call, so that arguments that change from call to call
cause no captures; one whose graph was given up for others' is captured at its `CALLS`-th call from then on, and the
second time no more. All other calls run uncaptured, and the report counts the reasons.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gdd_fast.acceleration.class_exchange import Fast, exchange, obstacle
from gdd_fast.engine.engines import MAX_GRAPHS, MOST_KINDS, Capture, Drops
from gdd_fast.errors import InputError

CALLS = 3
"""The call of a kind at which that kind is captured."""


@dataclass
class Forwards:
    """The captured forwards of a network (the last `limit` used are kept), and why other calls ran uncaptured."""

    device: torch.device
    capture: Capture
    limit: int = MAX_GRAPHS
    reasons: Counter[str] = field(default_factory=Counter)
    """How many calls ran uncaptured, by reason."""
    captures: int = 0
    replays: int = 0
    graphs: OrderedDict[Hashable, Callable[..., Any]] = field(default_factory=OrderedDict)
    _calls: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    _drops: Drops = field(default_factory=Drops)
    _refused: OrderedDict[Hashable, str] = field(default_factory=OrderedDict)
    _places: list[int] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forwards":
        """For a copy of the network, whose weights are elsewhere in memory: nothing is captured yet."""
        return Forwards(self.device, self.capture, self.limit)

    def __call__(self, net: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """`forward(*args, **kwargs)`, replayed if it can be."""
        leaves, spec = tree_flatten((args, kwargs))
        with self._lock:
            reason, replay = self._replay(net, forward, leaves, spec)
            if replay is not None:
                self.replays += 1
                # a 0-dimensional tensor may be on the host
                return replay(*(t.to(self.device) for t in leaves if isinstance(t, Tensor)))
            self.reasons[reason] += 1
        return forward(*args, **kwargs)

    def _replay(
        self, net: nn.Module, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> tuple[str, Callable[..., Any] | None]:
        """A function to call with the tensors, or the reason why there is none."""
        places: list[int] = []
        reason = self._obstacle(leaves) or _changed(net, places)
        if reason is not None:
            return reason, None
        key = _key(leaves, spec, self.device)
        if places != self._places:
            anew = bool(self.graphs)
            self.capture.drain()
            self.graphs.clear()
            self._drops = Drops()
            self._refused.clear()
            self._places = places
            if anew:
                return "weights or modules have moved: will be captured anew", None
        reason = self._refused.get(key) or self._too_early(key)
        if reason is not None:
            return reason, None
        try:
            return "", self._captured(key, forward, leaves, spec)
        except RuntimeError as error:  # raised by CUDA, and by us, for what cannot be captured
            self._refused[key] = f"its forward cannot be captured: {str(error).partition(chr(10))[0]}"
            if len(self._refused) > MOST_KINDS:
                self._refused.popitem(last=False)
            return self._refused[key], None

    def _obstacle(self, leaves: list[Any]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients may be asked for"
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return "the caller is compiling or capturing"
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self.device and not (leaf.is_cpu and leaf.dim() == 0):
                    return f"a tensor on {leaf.device}"
            elif not isinstance(leaf, int | float | str | type(None)):
                return f"an argument of type {type(leaf).__name__}"
        return None

    def _too_early(self, key: Hashable) -> str | None:
        if key in self.graphs:
            return None
        if self._drops.too_many(key):
            return f"more than {self.limit} kinds take turns"
        calls = self._calls.pop(key, 0) + 1
        self._calls[key] = calls
        if len(self._calls) > MOST_KINDS:
            self._calls.popitem(last=False)
        return None if calls >= CALLS else f"the first {CALLS - 1} calls of a kind"

    def _captured(
        self, key: Hashable, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> Callable[..., Any]:
        if key not in self.graphs:
            while len(self.graphs) >= self.limit:
                self.capture.drain()
                dropped, _ = self.graphs.popitem(last=False)
                self._calls.pop(dropped, None)
                self._drops.note(dropped)
            where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

            def on_tensors(*given: Tensor) -> Any:
                own = list(fixed)
                for i, t in zip(where, given, strict=True):
                    own[i] = t
                args, kwargs = tree_unflatten(own, spec)
                return _only_tensors(forward(*args, **kwargs))

            with torch.inference_mode(False), torch.no_grad():
                own = [leaves[i].to(self.device, copy=True) for i in where]
                self.graphs[key] = self.capture(on_tensors, *own)
                self.captures += 1
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def __str__(self) -> str:
        lines = [f"graphs: {len(self.graphs)} kinds of call kept, {self.captures} captures, {self.replays} replays"]
        lines += [f"  {count:>6} calls ran uncaptured: {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)


class FastNetwork(Fast):
    """A network whose forward is replayed where it can be."""

    state_name = "_gdd_graphs"  # apart from `_gdd_fast`: the network itself may also be a replaced layer
    _gdd_graphs: Forwards

    def fast_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._gdd_graphs(self, super().forward, args, kwargs)


def capture_forwards(net: nn.Module, device: torch.device, capture: Capture) -> Forwards:
    """Have the forwards of `net` without gradients captured by `capture` and replayed; `restore` undoes it.

    Raises InputError if its class cannot be exchanged.
    """
    reason = obstacle(net)
    if reason is not None:
        raise InputError(f'accelerate: engine="graph" cannot take this network: {reason}')
    forwards = Forwards(device, capture)
    exchange(net, FastNetwork, forwards)
    return forwards


def _only_tensors(result: Any) -> Any:
    """`result` itself; RuntimeError if it holds anything but tensors and plain values, which replays cannot copy."""
    for leaf in tree_flatten(result)[0]:
        if not isinstance(leaf, Tensor | int | float | str | type(None)):
            raise RuntimeError(f"it returns a {type(leaf).__name__}, whose tensors cannot be found")
    return result


def _changed(net: nn.Module, places: list[int]) -> str | None:
    """Why a replay would differ from a call, or None; appends the addresses of modules and weights to `places`."""
    if modules._has_any_global_hook():
        return "a global hook is set"
    waiting = [net]
    while waiting:
        module = waiting.pop()
        if module.training:
            return "training mode"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook is set on a {type(module).__name__}"
        if "forward" in module.__dict__:
            return f"the forward of a {type(module).__name__} was replaced on the instance"
        places.append(id(module))
        for t in module._parameters.values():
            if t is not None:
                places.append(t.data_ptr())
        for t in module._buffers.values():
            if t is not None:
                places.append(t.data_ptr())
        waiting.extend(child for child in module._modules.values() if child is not None)
    return None


def _key(leaves: list[Any], spec: TreeSpec, device: torch.device) -> Hashable:
    parts = [(t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves]
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    switches = (
        autocast,
        # the older switches, such as allow_tf32, cannot be read while these disagree with them
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (spec, *parts, switches)
