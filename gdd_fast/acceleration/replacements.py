"""Collects everything to be replaced before anything is replaced."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.acceleration.class_exchange import Fast, difference, exchange, obstacle
from gdd_fast.acceleration.summary import Entry, Report
from gdd_fast.backend import Backend, Operator, has_extension, resolve


@dataclass
class Decisions:
    """The modules of a network and the decision about each, which is made once.

    `place` is the network's device; its type decides what "auto" finds worth replacing. `captured`: calls are replayed
    from a graph, so the host's launch times do not matter.
    """

    net: nn.Module
    backend: Backend
    place: torch.device
    captured: bool = False
    names: dict[nn.Module, str] = field(init=False)
    replaced: dict[nn.Module, tuple[type[Fast], Any, str]] = field(default_factory=dict)
    left: dict[nn.Module, str] = field(default_factory=dict)
    inside: set[nn.Module] = field(default_factory=set)
    trials: dict[Hashable, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.net.named_modules()}

    def undecided(self, module: nn.Module) -> bool:
        return module not in self.replaced and module not in self.left and module not in self.inside

    def replace(self, module: nn.Module, mixin: type[Fast], state: Any, note: str) -> bool:
        """Mark `module` to be replaced, or left if its class forbids that; returns whether it will be replaced."""
        reason = obstacle(module)
        if reason is not None:
            self.leave(module, reason)
            return False
        self.replaced[module] = (mixin, state, note)
        return True

    def try_to_replace(
        self,
        module: nn.Module,
        mixin: type[Fast],
        state: Any,
        note: str,
        inputs: Callable[[torch.Generator], Iterable[Tensor | None]],
        like: Hashable,
    ) -> bool:
        """`replace` if a trial on `inputs` shows that the mixin computes the same. Modules of a class with equal `like`
        share a trial, so `like` has to hold everything that can make a difference."""
        key = (type(module), mixin, like)
        if key not in self.trials:
            self.trials[key] = obstacle(module) or difference(module, mixin, state, inputs, self.place)
        if self.trials[key] is not None:
            self.leave(module, self.trials[key])
            return False
        return self.replace(module, mixin, state, note)

    def leave(self, module: nn.Module, reason: str) -> None:
        self.left[module] = reason

    def absorb(self, *modules: nn.Module | None) -> None:
        """Mark these as computed by a replaced module that holds them."""
        self.inside.update(module for module in modules if module is not None)

    def backend_of(self, operator: Operator) -> Backend | None:
        """The backend to call `operator` with, or None if "auto" has only its definition in plain PyTorch.

        A backend requested by name applies to the operators that have it; the others run their definition. Raises
        BackendError if that backend cannot run here.
        """
        if self.backend == "auto":
            nothing = resolve("auto", operator, self.place.type) == "torch" or self._launches_slowly(operator)
            return None if nothing else "auto"
        if self.backend not in operator.fused:
            return "torch"
        return resolve(self.backend, operator, self.place.type)

    def _launches_slowly(self, operator: Operator) -> bool:
        waits = self.place.type == "cuda" and not self.captured and not has_extension()
        return waits and resolve("auto", operator, self.place.type) == "triton"

    def missing(self, operator: Operator) -> str:
        """The reason for leaving a module for which `backend_of(operator)` is None."""
        if self._launches_slowly(operator):
            return (
                "the extension is not built, and Triton's own launcher takes the host twice as long as the original "
                'for small batches: build the extension, or ask for backend="triton" or engine="graph"'
            )
        return f"{operator.name} has no fused implementation for {self.place.type} here: PyTorch's is as fast"

    def carry_out(self) -> Report:
        """Exchange the classes of all modules to be replaced, and report every decision."""
        for module in self.names:
            if (
                self.undecided(module)
                and not isinstance(module, nn.Identity)
                and not any(True for _ in module.children())
            ):
                self.leave(module, "gdd_fast has nothing faster for it")
        for module, (mixin, state, _) in self.replaced.items():
            exchange(module, mixin, state)
        entry = lambda module, note: Entry(self.names[module], type(module).__name__, note)
        return Report(
            self.backend,
            self.place.type,
            tuple(entry(module, note) for module, (_, _, note) in self.replaced.items()),
            tuple(entry(module, note) for module, note in self.left.items()),
            self.net,
        )
