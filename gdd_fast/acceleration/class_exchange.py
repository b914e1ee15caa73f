"""How a module computes differently and stays what it is: its class is exchanged for a subclass with another `forward`.

The subclass is made of a mixin of ours, a `Fast`, and the module's own class, whose name it bears. So `isinstance`, the
state_dict, parameters, hooks, attributes and code that asks for a class name see no difference, `super().forward` is
the original, and giving the class back restores it. PyTorch's parametrisations and FSDP2 work in the same way.

A mixin decides at every call whether it may run: modes, `requires_grad` and hooks can change after the exchange. What
it needs besides the module lies in `module._gdd_fast`, a plain object that is no part of any state_dict.

A deep copy of an exchanged module is exchanged as well. A pickle, a shallow copy and the replicas of nn.DataParallel
are of the original class and know nothing of gdd_fast.
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE = "_gdd_fast"


class Fast:
    """Base of the mixins. `super().forward` in them is the original's."""

    original: ClassVar[type[nn.Module]]
    _gdd_fast: Any

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "gdd_fast")))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fast":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: int) -> Any:
        # not by copyreg.__newobj__, protocol 2's way: pickle wants that to name the class of the object at hand
        return _plain(self).__reduce_ex__(min(protocol, 1))

    def _replicate_for_data_parallel(self) -> nn.Module:
        return _plain(self)._replicate_for_data_parallel()


def _plain(module: Fast) -> nn.Module:
    """`module` in its original class, with the same parameters, buffers and children."""
    twin = object.__new__(module.original)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != STATE})
    return twin


@functools.cache
def _class(mixin: type[Fast], original: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "original": original})


def exchange(module: nn.Module, mixin: type[Fast], state: Any) -> None:
    """Let `module` compute as `mixin` says, with `state` as its `_gdd_fast`."""
    module.__dict__[STATE] = state
    module.__class__ = _class(mixin, type(module))


def give_back(module: nn.Module) -> bool:
    """The inverse of `exchange`; whether there was anything to do."""
    if not isinstance(module, Fast):
        return False
    module.__class__ = module.original
    del module.__dict__[STATE]
    return True


def obstacle(module: nn.Module) -> str | None:
    """Why the class of `module` cannot be exchanged, whatever it computes, or None."""
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized: its weight is computed anew at every use"
    if hasattr(type(module), "__deepcopy__"):
        return "its class has its own way of being copied"
    return None


def library_class(module: str, name: str) -> type | None:
    """A class of somebody else's library, if the program uses that library; nothing is imported."""
    return getattr(sys.modules.get(module), name, None)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, so that what is computed now has its values in a replay only."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def silent(module: nn.Module) -> bool:
    """Whether no hook listens to `module`, so that it need not be called."""
    # written out: this runs for every layer at every call
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@contextlib.contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """While inside, no hook in `module` fires."""
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
    """Why `mixin` may not stand for `module`: they were tried on small random inputs and differ. None if they agree.

    This is how a class is recognised that is known by its attributes alone, and how another version of a library shows.
    The trial has random parameters: many of a trained network's start at zero, which hides what they multiply. The
    module is in evaluation mode and unheard for the while.
    """
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
        except Exception as error:  # a stranger's forward, called as it may not be meant to be
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
    return max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
