"""How a module computes differently yet stays what it is: its class is exchanged for a subclass with another `forward`.

The subclass combines a mixin of ours, a `Fast`, with the module's own class, whose name it takes. So `isinstance`, the
state_dict, parameters, hooks, attributes and code that asks for a class name see no difference, `super().forward` is
the original, and giving the class back restores the module. PyTorch's parametrisations and FSDP2 work likewise.

Whether a mixin may run is decided at every call, since modes, `requires_grad` and hooks can change after the exchange:
by `ordinary` for all mixins, then by each mixin itself. What a mixin needs besides the module is in `module._gdd_fast`,
a plain object that is not part of any state_dict. It describes the module and holds nothing computed from a parameter
or buffer: these can change unnoticed (see `gdd_fast.ops.frozen_conv2d.converted`).

A deep copy of an exchanged module is exchanged as well. A pickle, a shallow copy and the replicas of nn.DataParallel
have the original class and know nothing of gdd_fast.
"""

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gdd_fast.layers.silent import plain

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE = "_gdd_fast"


class Fast:
    """Base of the mixins, which define `fast_forward`. In them, `super().forward` is the original's."""

    original: ClassVar[type[nn.Module]]
    state_name: ClassVar[str] = STATE
    _gdd_fast: Any

    def fast_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "gdd_fast")))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fast":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: int) -> Any:
        # not by copyreg.__newobj__, as protocol 2 does: pickle then demands that it name the class of this very object
        return _plain(self).__reduce_ex__(min(protocol, 1))

    def _replicate_for_data_parallel(self) -> nn.Module:
        return _plain(self)._replicate_for_data_parallel()


def _plain(module: Fast) -> nn.Module:
    """`module` in its original class, with the same parameters, buffers and children."""
    original, states = type(module), set()
    while issubclass(original, Fast):
        states.add(original.state_name)
        original = original.original
    twin = object.__new__(original)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in states})
    return twin


@functools.cache
def _class(mixin: type[Fast], original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, mixin):  # a hook kept this method and outlived the exchange
            return type(self).forward(self, *args, **kwargs)
        if not ordinary(self):
            return original.forward(self, *args, **kwargs)
        return mixin.fast_forward(self, *args, **kwargs)  # called on the mixin: exchanged classes may be stacked

    # torch.compile keys shapes and recompilations by a function's name and location, which all classes would share
    forward.__code__ = forward.__code__.replace(co_name=f"{mixin.__module__}.{mixin.__name__}.{original.__qualname__}")
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "original": original, "forward": forward})


def exchange(module: nn.Module, mixin: type[Fast], state: Any) -> None:
    """Make `module` compute by `mixin`, with `state` stored under the mixin's `state_name`."""
    module.__dict__[mixin.state_name] = state
    module.__class__ = _class(mixin, type(module))


def give_back(module: nn.Module) -> bool:
    """Undo every `exchange`; returns whether there was one. Not for a module that is `covered`."""
    exchanged = isinstance(module, Fast)
    while isinstance(module, Fast):
        del module.__dict__[module.state_name]
        module.__class__ = module.original
    return exchanged


def covered(module: nn.Module) -> bool:
    """Whether another class was put on top of ours, as FSDP2 and parametrisations do; `give_back` would lose it."""
    return isinstance(module, Fast) and "original" not in vars(type(module))


def obstacle(module: nn.Module) -> str | None:
    """Why the class of `module` cannot be exchanged, regardless of what it computes; None if it can."""
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized: its weight is recomputed at every use"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as offloading and casting do: accelerate before that"
    if not isinstance(module, Fast) and hasattr(type(module), "__deepcopy__"):
        return "its class defines its own way of being copied"
    return None


def library_class(module: str, name: str) -> type | None:
    """A class of another library, or None if the program has not imported that library; nothing is imported here."""
    return getattr(sys.modules.get(module), name, None)


def ordinary(module: nn.Module) -> bool:
    """Whether `module` is called for an ordinary computation, on ordinary tensors.

    It is not under torch.func transforms or forward-mode derivatives, which do not know our operators; nor under
    torch.jit tracing, whose result must run without gdd_fast; nor if a parameter is of a tensor subclass, such as
    quantised or distributed ones, which have operators of their own.
    """
    if torch.compiler.is_compiling():
        return plain(module)
    special = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()
    return not special and plain(module)


@contextlib.contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """Within the block, no hook in `module` fires."""
    kept = [(child, name, child.__dict__[name]) for child in module.modules() for name in HOOKS]
    for child, name, hooks in kept:
        child.__dict__[name] = type(hooks)()
    try:
        yield
    finally:
        for child, name, hooks in kept:
            child.__dict__[name] = hooks


@torch.no_grad()
def difference(
    module: nn.Module,
    mixin: type[Fast],
    state: Any,
    inputs: Callable[[torch.Generator], Iterable[Tensor | None]],
    device: torch.device,
) -> str | None:
    """Why `mixin` may not replace `module`: they differ in a trial on small random inputs. None if they agree.

    This confirms a class that is recognised by its attributes alone, and detects another version of a library. The
    trial uses random parameters: many parameters start at zero, which hides what they multiply. During the trial the
    module is in evaluation mode and its hooks are off.
    """
    if any("forward" in vars(child) for child in module.modules()):
        return "the forward of a layer in it was replaced on the instance: accelerate before that"
    like = next(module.parameters(), torch.zeros((), device=device))
    generator = torch.Generator().manual_seed(0)
    draw: Callable[[Tensor], Tensor] = lambda p: torch.randn(p.shape, generator=generator) / _fan_in(p) ** 0.5
    parameters = {name: draw(p).to(p.device, p.dtype) for name, p in module.named_parameters()}
    arguments = tuple(None if x is None else x.to(like.device, like.dtype) for x in inputs(generator))
    modes = [(child, child.training) for child in module.modules()]
    with unheard(module), torch.autocast(like.device.type, enabled=False):
        try:
            for child, _ in modes:
                child.training = False
            want = torch.func.functional_call(module, parameters, arguments)
            exchange(module, mixin, state)
            got = torch.func.functional_call(module, parameters, arguments)
        except Exception as error:  # a foreign forward, perhaps not meant to be called like this
            return f"a trial of it failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        finally:
            give_back(module)
            for child, training in modes:
                child.training = training
    if not isinstance(want, Tensor) or (want.shape, want.dtype) != (got.shape, got.dtype):
        return "in a trial it returned something else"
    tolerance = 64 * torch.finfo(want.dtype).eps * want.abs().max()
    return None if (got - want).abs().max() <= tolerance else "in a trial it computed something else"


def _fan_in(parameter: Tensor) -> int:
    return max(math.prod(parameter.shape[1:]), 1) if parameter.dim() > 1 else 4
