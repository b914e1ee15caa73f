"""Networks sharded over the ranks: FSDP2, `torch.distributed.fsdp.fully_shard` (Zhao et al., arXiv 2304.11277).

Each rank holds its shard of every parameter, gradient, moment and average: 1 / `world.size` of everything but the
batch. A U-Net block's weights are gathered when it is called and freed after it, forward and backward. Files never hold
shards: an unsharded run can read the checkpoint of a sharded one, and vice versa.

A shard is a DTensor, recognised by its methods: importing the class takes a second, which other runs need not wait.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ranks import World

Net = TypeVar("Net", bound=Preconditioned)


def check_sharding(net: Preconditioned, processes: int) -> None:
    """Raise ConfigError if `shard` does not work for this network on this number of processes."""
    if processes == 1:
        raise ConfigError(
            "--fsdp shards a network over several processes, but there is only one: start it with "
            "torchrun --standalone --nproc_per_node=N, or leave --fsdp out"
        )
    if net.foreign:
        raise ConfigError("--fsdp is for EDM's networks, but the teacher is from diffusers: leave it out")


def shard(net: Preconditioned, world: World) -> None:
    """Shard the parameters of `net` over the ranks, in place, on their device; `net` may still be on the CPU.

    Its class becomes a subclass of FSDPModule, its parameters become DTensors. Every rank calls this, and later makes
    the same forward and backward calls as the others. Gradients are averaged over the ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 supports no other
    # By default the outermost module stays gathered after a forward without gradients, and a step on the shards would
    # leave old weights there.
    blocks = [module for module in net.modules() if isinstance(module, UNetBlock)]
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def form_of(net: Net) -> Net:
    """An unsharded `net` on the meta device, without values: for `assembled`, and to save weights under its form."""
    return copy.deepcopy(net).to("meta")


def assembled(form: Net, sharded: nn.Module) -> Net:
    """A network like `form` with the current weights of `sharded`, whole on every rank. Every rank calls it."""
    net = copy.deepcopy(form)
    net.load_state_dict({name: whole(t) for name, t in sharded.state_dict().items()}, assign=True)
    return net


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is sharded, and this rank holds only its shard."""
    return hasattr(t, "full_tensor")


def own_part(t: Any) -> Tensor:
    """The part of `t` that this rank holds: its shard, or all of a tensor that is not sharded."""
    return t.to_local() if is_sharded(t) else t


def laid_out_as(parameter: Tensor, saved: Tensor) -> Tensor:
    """A copy of `saved`, whole or sharded like `parameter`, laid out like `parameter` in memory and over ranks.

    Raises ValueError if the shapes differ.
    """
    if saved.shape != parameter.shape:
        raise ValueError(f"a tensor of shape {tuple(saved.shape)} for a parameter of shape {tuple(parameter.shape)}")
    if is_sharded(parameter) and not is_sharded(saved):
        from torch.distributed.tensor import distribute_tensor

        found: Any = parameter
        saved = saved.to(parameter.device)
        saved = distribute_tensor(saved, found.device_mesh, found.placements, src_data_rank=None)  # each rank has it
    return torch.empty_like(parameter, requires_grad=False).copy_(saved)


def gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """`tensors`, with sharded ones made whole on the CPU, for the main rank only. Every rank calls it."""
    found = {}
    for name, t in tensors.items():
        if is_sharded(t):
            t = whole(t)  # one at a time: a GPU may not have room for all
            if not world.is_main:
                continue
            t = t.cpu()
        found[name] = t
    return found


def whole(t: Any) -> Tensor:
    """All of `t`, on every rank, detached. Every rank calls it."""
    return t.detach().full_tensor() if is_sharded(t) else t.detach()
