"""Networks that are spread over the ranks: FSDP2, `torch.distributed.fsdp.fully_shard` (Zhao et al., arXiv 2304.11277).

Each rank holds its part of every parameter, and so of its gradient, its moments and its average: of all but the batch,
one in `world.size`. A U-Net block's weights are gathered when it is called and freed behind it, forward and backward.
Files never hold a part: what a checkpoint says of a sharded run, an unsharded one reads, and the other way round.

A part is a DTensor. It is told by its methods, as to import the class takes a second that other runs need not wait for.
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
    """Raise ConfigError if `shard` cannot serve a run of this network on so many processes."""
    if processes == 1:
        raise ConfigError(
            "--fsdp shares a network out to several processes and there is one: start it with "
            "torchrun --standalone --nproc_per_node=N, or leave --fsdp out"
        )
    if net.foreign:
        raise ConfigError("--fsdp is for EDM's networks, and the teacher is one of diffusers': leave it out")


def shard(net: Preconditioned, world: World) -> None:
    """Spread the parameters of `net` over the ranks, in place, on their device; it may be on the CPU before.

    Its class becomes a subclass of FSDPModule's, its parameters become DTensors. Every rank calls it, and later every
    forward and backward, as often as the others. Gradients arrive averaged over the ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    # By default the outermost part stays gathered behind a forward without gradient, and a step on the parts would
    # leave old weights there.
    blocks = [module for module in net.modules() if isinstance(module, UNetBlock)]
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def form_of(net: Net) -> Net:
    """`net` without values, on the meta device, before it is sharded: for `assembled`, and to save weights as its."""
    return copy.deepcopy(net).to("meta")


def assembled(form: Net, sharded: nn.Module) -> Net:
    """A network like `form` with the weights that `sharded` has now, whole on every rank. Every rank calls it."""
    net = copy.deepcopy(form)
    net.load_state_dict({name: whole(t) for name, t in sharded.state_dict().items()}, assign=True)
    return net


def is_sharded(t: Tensor) -> bool:
    """Whether this rank holds a part of `t`."""
    return hasattr(t, "full_tensor")


def own_part(t: Any) -> Tensor:
    """The memory of `t` that this rank holds: its part, or all of a tensor that is not sharded."""
    return t.to_local() if is_sharded(t) else t


def laid_out_as(parameter: Tensor, saved: Tensor) -> Tensor:
    """A copy of `saved`, whole or spread as `parameter` is, that lies in memory, and over the ranks, as that does.

    Raises ValueError if the shapes differ.
    """
    if saved.shape != parameter.shape:
        raise ValueError(f"a tensor of shape {tuple(saved.shape)} for a parameter of shape {tuple(parameter.shape)}")
    if is_sharded(parameter) and not is_sharded(saved):
        from torch.distributed.tensor import distribute_tensor

        found: Any = parameter
        saved = saved.to(parameter.device)
        saved = distribute_tensor(saved, found.device_mesh, found.placements, src_data_rank=None)  # each has it whole
    return torch.empty_like(parameter, requires_grad=False).copy_(saved)


def gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """`tensors` with those whole, on the CPU, that are sharded; for the main rank. Every rank calls it."""
    found = {}
    for name, t in tensors.items():
        if is_sharded(t):
            t = whole(t)  # one at a time: a GPU has no room for all
            if not world.is_main:
                continue
            t = t.cpu()
        found[name] = t
    return found


def whole(t: Any) -> Tensor:
    """All of `t`, on every rank, without gradient. Every rank calls it."""
    return t.detach().full_tensor() if is_sharded(t) else t.detach()
