"""Chooses the implementation of the operators for a whole network."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn

from gdd_fast.backend import Backend, Operator, resolve_all
from gdd_fast.errors import BackendError
from gdd_fast.layers.self_attention import Attention
from gdd_fast.ops.attention import OPERATOR as ATTENTION
from gdd_fast.ops.attention import check_triton


def operators_of(net: nn.Module) -> set[Operator]:
    """The operators in `net` that `set_backend` chooses an implementation for."""
    found = (getattr(module, "operator", None) for module in net.modules())
    return {operator for operator in found if isinstance(operator, Operator)}


def set_backend(net: nn.Module, backend: Backend) -> None:
    """Set the implementation of every operator in `net` that has it; the others run their definition.

    "auto" is the default of every layer. Raises BackendError for an unknown name. A backend that cannot run on the
    network's device raises the same error when it is first called.
    """
    if backend not in get_args(Backend):
        raise BackendError(f"unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    for module in net.modules():
        operator = getattr(module, "operator", None)
        if isinstance(operator, Operator):
            chosen: Any = backend if backend == "auto" or backend in operator.fused else "torch"
            module.backend = chosen


def choose_backend(
    backend: Backend, device: str, nets: Iterable[nn.Module], further: Iterable[Operator] = ()
) -> dict[str, Backend]:
    """`set_backend` for all networks of a run -> what runs, by operator's name; see gdd_fast.backend.resolve_all.

    `further` are the operators that the run itself calls. Raises BackendError before anything is set, also if a backend
    requested by name does not support a layer's form or a network's compute dtype.
    """
    nets = list(nets)
    runs = resolve_all(backend, {*further}.union(*(operators_of(net) for net in nets)), device)
    for net in nets:
        for layer in net.modules():
            if isinstance(layer, Attention) and runs[ATTENTION.name] == "triton":
                check_triton(layer.head_dim, getattr(net, "dtype", torch.float32), device)
    for net in nets:
        set_backend(net, backend)
    return runs
