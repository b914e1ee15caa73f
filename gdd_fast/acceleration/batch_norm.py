"""Which batch norms follow which convolutions, and folding them without touching a parameter.

That a norm follows a convolution is read off the forward of the module that holds both: it is traced once with its
children as black boxes (torch.fx). The convolution's result must go to the norm and nowhere else.

Folded weight and bias are made from the parameters in the call that uses them, and not kept: nothing shows when they
would be out of date. That is a pass over the weight in place of one over the map, and for backward the folded weight is
saved in place of the norm's input; so a norm is folded where the map is the larger of the two by `MARGIN`. The
convolution then computes with these and tells the norm, which hands its input on. It does so only within the forward
that was traced (`Gate`): called from anywhere else, the convolution convolves and the norm normalises.
"""

import copy
import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdd_fast.acceleration.class_exchange import Fast
from gdd_fast.layers.silent import silent
from gdd_fast.ops._memory_format import compute_dtype

MARGIN = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements of a map over which a pass takes as long as the half dozen small operators of folding."""


class _Running(threading.local):
    """Per thread: how deep it is in the forward of a gate's module, and the norms that are done for this call."""

    def __init__(self) -> None:
        self.depth = 0
        self.done: set[Fold] = set()


class Gate:
    """Open while the module that holds a convolution and its norm runs its own forward, in the thread that runs it."""

    def __init__(self, arity: int) -> None:
        self.arity = arity
        self._running = _Running()

    def is_open(self) -> bool:
        return self._running.depth > 0

    @property
    def done(self) -> "set[Fold]":
        """The norms whose work a convolution has done, and that have not been called since."""
        return self._running.done

    def __enter__(self) -> None:
        self._running.depth += 1

    def __exit__(self, *error: object) -> None:
        self._running.depth -= 1
        if error[0] is not None or not self._running.depth:
            self._running.done.clear()  # an error may have come between a convolution and its norm

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        gate = memo[id(self)] = Gate(self.arity)
        return gate


class FastParent(Fast):
    """Opens its gate while its own forward runs, if it is called as it was traced."""

    _gdd_fast: Gate

    def fast_forward(self, *args: Any, **kwargs: Any) -> Any:
        gate = self._gdd_fast
        if torch.compiler.is_compiling() or kwargs or len(args) != gate.arity:
            return super().forward(*args, **kwargs)
        with gate:
            return super().forward(*args)


class Fold:
    """A frozen batch norm within the weight and bias of the convolution before it."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gate: Gate) -> None:
        self.conv, self.norm, self.gate = conv, norm, gate

    def active(self, x: Tensor) -> bool:
        """Whether the convolution is to do the norm's work on `x`, the map that it is given."""
        # a compiler fuses the norm into what follows it
        if torch.compiler.is_compiling() or not self.gate.is_open() or x.dim() != 4:
            return False
        conv, norm = self.conv, self.norm
        if norm.training or not (silent(conv) and silent(norm) and frozen(conv) and frozen(norm)):
            return False
        pixels = (x.shape[2] // conv.stride[0]) * (x.shape[3] // conv.stride[1])
        margin = MARGIN.get(x.device.type, MARGIN["cuda"])
        larger = len(x) * pixels * conv.out_channels >= conv.weight.numel() + margin
        # without gradients what is gained is a pass over the map; on a GPU the bias, added in a pass of its own, is one
        return larger and (x.is_cpu or (x.requires_grad and torch.is_grad_enabled()))

    @torch.no_grad()
    def weight_and_bias(self, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        """In `dtype`, the weight in channels_last if that is `layout`; both are rounded to it once."""
        conv, norm = self.conv, self.norm
        full = compute_dtype(conv.weight)
        scale = norm.running_var.to(full).add(norm.eps).rsqrt_()
        if norm.weight is not None:
            scale.mul_(norm.weight)
        mean = norm.running_mean.to(full)
        mean = mean if conv.bias is None else mean - conv.bias
        bias = mean.mul(scale).neg_() if norm.bias is None else torch.addcmul(norm.bias.to(full), mean, scale, value=-1)
        layout = layout if layout is torch.channels_last else torch.preserve_format
        weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=layout)
        torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=weight)
        return weight, bias.to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fold":
        twin = memo[id(self)] = object.__new__(Fold)
        conv, norm, gate = (copy.deepcopy(part, memo) for part in (self.conv, self.norm, self.gate))
        Fold.__init__(twin, conv, norm, gate)
        return twin

    def finish(self) -> None:
        """Called by the convolution when it has done the norm's work."""
        self.gate.done.add(self)

    def finished(self) -> bool:
        """Asked by the norm, once per call: whether its work is done."""
        done = self.gate.done
        if self not in done:
            return False
        done.remove(self)
        return True


class FastBatchNorm(Fast):
    """Hands its input on where the convolution before it has done its work."""

    _gdd_fast: Fold

    def fast_forward(self, x: Tensor) -> Tensor:
        return x if self._gdd_fast.finished() else super().forward(x)


class FastBatchNormAct(Fast):
    """timm's batch norm with its dropout and activation, of which only the norm may be done already."""

    _gdd_fast: Fold

    def fast_forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x)) if self._gdd_fast.finished() else super().forward(x)


def frozen(module: nn.Module) -> bool:
    """Whether neither weight nor bias is trained, be they parameters or computed by a parametrisation."""
    return not any(t is not None and t.requires_grad for t in (module.weight, module.bias))


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
