"""Make somebody else's network faster without changing what it computes.

    net = gdd_fast.accelerate(net)
    net, report = gdd_fast.accelerate(net, report=True)
    print(report)
    gdd_fast.restore(net)

It knows the U-Nets of EDM and GDD as their own code builds or unpickles them, diffusers' UNet2DModel and its blocks,
and frozen networks of convolutions, batch norms, ReLU and pooling, such as those of timm and torchvision.
"""

import contextlib
import dataclasses
import itertools
import warnings
from typing import Literal, TypeVar, get_args, overload

import torch
from torch import nn

from gdd_fast.acceleration import diffusers_unet as unet2d
from gdd_fast.acceleration import edm_unet as edm
from gdd_fast.acceleration import frozen
from gdd_fast.acceleration.graphs import capture_forwards
from gdd_fast.acceleration.replacements import Decisions
from gdd_fast.acceleration.summary import Entry, Report, restore
from gdd_fast.backend import Backend
from gdd_fast.engine.engines import CudaCapture
from gdd_fast.errors import BackendError, InputError

__all__ = ["Entry", "Report", "accelerate", "restore"]

Network = TypeVar("Network", bound=nn.Module)
NetworkEngine = Literal["eager", "graph"]


@overload
def accelerate(
    net: Network, *, backend: Backend = "auto", engine: NetworkEngine = "eager", report: Literal[False] = False
) -> Network: ...


@overload
def accelerate(
    net: Network, *, backend: Backend = "auto", engine: NetworkEngine = "eager", report: Literal[True]
) -> tuple[Network, Report]: ...


def accelerate(
    net: Network, *, backend: Backend = "auto", engine: NetworkEngine = "eager", report: bool = False
) -> Network | tuple[Network, Report]:
    """Replace, in place, the forward of every module in `net` that gdd_fast computes faster or in less memory.

    Parameters, buffers, the state_dict, hooks and classes stay as they are; only how a module computes changes. What
    depends on modes, `requires_grad` or hooks is decided at every call, so the network can be trained, frozen, moved
    and copied as before. A network that is already accelerated is restored first. See docs/accelerate.md.

    Args:
        net: a module, already on its device: what is worth replacing depends on the device.
        backend: "auto" replaces a module where that is no slower on the network's device, even at batch 1. Any other
        name of gdd_fast.backend replaces every known module; operators run that implementation or, if they lack it,
        their definition in PyTorch.
        engine: "eager", or "graph": forwards without gradients are captured as CUDA graphs, one for each kind of call
        (shapes, strides and dtypes of its tensors, and its other arguments), and replayed, so that a small batch does
        not wait for the host. With gradients, hooks or training mode, or once weights have moved, the forward runs
        uncaptured; the report counts the reasons.
        report: also return a `Report` of what was replaced, what was left, and why.

    Returns:
        `net`, or `(net, report)`.

    Raises:
        InputError: `net` is not a module, has no memory yet (its parameters are on the meta device), or was accelerated
            and then sharded or parametrized (see `restore`).
        BackendError: an unknown backend or engine, or one that cannot run on the network's device.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"accelerate: give a torch.nn.Module, not {type(net).__name__}")
    if backend not in get_args(Backend):
        raise BackendError(f"accelerate: unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    if engine not in get_args(NetworkEngine):
        raise BackendError(f"accelerate: unknown engine {engine!r}; there are {', '.join(get_args(NetworkEngine))}")
    device = _device_of(net)
    if engine == "graph" and device.type != "cuda":
        raise BackendError(f'accelerate: engine "graph" needs CUDA and cannot run on {device}; use "eager"')
    done = _replace(net, backend, device, captured=engine == "graph")
    if engine == "graph":
        forwards = capture_forwards(net, device, CudaCapture(device, contextlib.nullcontext))
        done = dataclasses.replace(done, forwards=forwards)
    if report:
        return net, done
    if not done.replaced and engine == "eager":
        warnings.warn(f"nothing could be replaced; accelerate(net, report=True) says why\n{done}", stacklevel=2)
    return net


def _device_of(net: nn.Module) -> torch.device:
    device = next((t.device for t in itertools.chain(net.parameters(), net.buffers())), torch.device("cpu"))
    if device.type == "meta":
        raise InputError(
            "accelerate: the network's parameters are on the meta device: load its weights first; if hooks offload "
            "them (sequential offload), call accelerate before adding the hooks"
        )
    return device


def _replace(net: nn.Module, backend: Backend, device: torch.device, *, captured: bool) -> Report:
    restore(net)
    decisions = Decisions(net, backend, device, captured)
    for decide in (edm.decide, unet2d.decide, frozen.decide):
        decide(decisions)
    return decisions.carry_out()


def accelerate_foreign(net: nn.Module, backend: Backend = "auto") -> None:
    """`accelerate` for a network whose layers come from another library (`Preconditioned.foreign`); does nothing to
    others. Training loops and samplers call it for every network, once it is on its device: they capture their steps or
    use large batches, so launch times do not count."""
    if getattr(net, "foreign", False):
        _replace(net, backend, _device_of(net), captured=True)
