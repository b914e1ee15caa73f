"""Which batch norms follow which convolutions, and folding them without touching a parameter.

That a norm follows a convolution is read off the forward of the module that holds both: it is traced once with its
children as black boxes (torch.fx). The convolution's result must go to the norm and nowhere else.

Folded weight and bias are made from the parameters and kept beside them until one changes. The convolution then
computes with these and the norm hands its input on. Both ask the same `Fold` at every call, and it says yes only within
the forward that was traced (`Gate`): called from anywhere else, the convolution convolves and the norm normalises.
"""

import copy
import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gdd_fast.acceleration.class_exchange import Fast, capturing, silent


class Gate:
    """Open while the module that holds a convolution and its norm runs its own forward, in the thread that runs it."""

    def __init__(self, arity: int) -> None:
        self.arity = arity
        self._local = threading.local()

    def is_open(self) -> bool:
        return getattr(self._local, "depth", 0) > 0

    def __enter__(self) -> None:
        self._local.depth = getattr(self._local, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        self._local.depth -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        gate = memo[id(self)] = Gate(self.arity)
        return gate


class FastParent(Fast):
    """Opens its gate while its own forward runs, if it is called as it was traced."""

    _gdd_fast: Gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gate = self._gdd_fast
        if torch.compiler.is_compiling() or kwargs or len(args) != gate.arity:
            return super().forward(*args, **kwargs)
        with gate:
            return super().forward(*args)


class _Cache(NamedTuple):
    key: tuple[tuple[int, int] | None, ...]
    sources: tuple[Tensor | None, ...]
    eps: float
    folded: tuple[Tensor, Tensor]


class Fold:
    """A frozen batch norm within the weight and bias of the convolution before it."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gate: Gate) -> None:
        self.conv, self.norm, self.gate = conv, norm, gate
        self._cache: _Cache | None = None

    def active(self) -> bool:
        """Whether the convolution does the norm's work in the call at hand."""
        # a compiler fuses the norm into what follows it, and could not see when the copies grow old
        if torch.compiler.is_compiling() or not self.gate.is_open():
            return False
        conv, norm = self.conv, self.norm
        return not norm.training and frozen(conv) and frozen(norm) and silent(conv) and silent(norm)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """In the dtype of the convolution's weight; made in float64, so that rounding them once is the whole error."""
        norm, cache = self.norm, self._cache
        sources = (*self.conv._parameters.values(), *norm._parameters.values(), *norm._buffers.values())
        key = tuple([None if t is None or t.is_inference() else (t._version, t.data_ptr()) for t in sources])
        same = cache is not None and cache.key == key and cache.eps == norm.eps
        if not same or any(a is not b for a, b in zip(cache.sources, sources, strict=True)):
            folded = _fold(self.conv, norm)
            if capturing(self.conv.weight) or any(t is not None and t.is_inference() for t in sources):
                return folded  # holds its values in a replay only, or of tensors that tell no version
            cache = self._cache = _Cache(key, sources, norm.eps, folded)
        return cache.folded

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fold":
        twin = memo[id(self)] = object.__new__(Fold)
        conv, norm, gate = (copy.deepcopy(part, memo) for part in (self.conv, self.norm, self.gate))
        Fold.__init__(twin, conv, norm, gate)  # the copy folds anew
        return twin


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    # ordinary tensors even if made in inference mode, so that autograd can save them later
    with torch.inference_mode(False), torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.double()
        shift = shift if conv.bias is None else shift + conv.bias.double() * scale
        weight = torch.empty_like(conv.weight)  # in the same memory format
        weight.copy_(conv.weight.double() * scale[:, None, None, None])
        return weight, shift.to(weight.dtype)


class FastBatchNorm(Fast):
    """Hands its input on where the convolution before it has done its work."""

    _gdd_fast: Fold

    def forward(self, x: Tensor) -> Tensor:
        return x if self._gdd_fast.active() else super().forward(x)


class FastBatchNormAct(Fast):
    """timm's batch norm with its dropout and activation, of which only the norm may be done already."""

    _gdd_fast: Fold

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x)) if self._gdd_fast.active() else super().forward(x)


def frozen(module: nn.Module) -> bool:
    """Whether none of the module's own parameters is trained."""
    return all(p is None or not p.requires_grad for p in module._parameters.values())


class Untraceable(Exception):
    """The forward of a module cannot be followed without running it; the text says why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def sequence(parent: nn.Module) -> tuple[int, list[tuple[nn.Module, nn.Module]]]:
    """The number of arguments of `parent.forward` that have no default, and (first, then) for each child whose only use
    is to be called once and whose result goes to the child `then` alone, called once as well.

    Raises Untraceable.
    """
    signature = inspect.signature(type(parent).forward)
    parameters = list(signature.parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Untraceable("its holder's forward takes any number of arguments")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    training, parent.training = parent.training, False
    try:
        graph = _Tracer().trace(parent, concrete_args=defaults or None)
    except Exception as error:  # whatever a stranger's forward raises when it is given stand-ins for tensors
        raise Untraceable(f"its holder's forward cannot be traced ({type(error).__name__})") from error
    finally:
        parent.training = training
    return len(parameters) - len(defaults), list(_neighbours(parent, graph))


def _neighbours(parent: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    calls = [(node, parent.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"]
    times = Counter(module for _, module in calls)
    called = {node: module for node, module in calls if times[module] == 1}
    for node, module in called.items():
        users = list(node.users)
        if len(users) == 1 and users[0] in called and users[0].args == (node,) and not users[0].kwargs:
            yield module, called[users[0]]
