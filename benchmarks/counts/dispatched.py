"""`python -m benchmarks.counts.dispatched`: operators dispatched in a forward pass, stock network against engine.

Every call that reaches PyTorch's dispatcher from Python is counted, views of memory among them ("compute" leaves them
out). What an operator calls inside, ours or PyTorch's, is not. Three networks:

    EDM         EDM's own code, counted once in the same way with PyTorch 2.13 (it is no part of this project)
    plain       gdd_fast's network with every operator replaced by its definition in PyTorch
    engine      what OneStepGenerator runs, on a GPU and on a CPU

The GPU's count needs none: tensors are fake, those that torch.compile traces with, and operators are called as they
would be. The CPU's is of real calls. The networks have all their layers, with fewer channels.
"""

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases.layer_calls import NETWORKS
from gdd_fast.engine.fold import SIGMA, Conditioning, fold, make_target
from gdd_fast.engine.folded_unet import FoldedUNet
from gdd_fast.layers import convolution, self_attention
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.skip_pair import Pair
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ops import group_norm_silu, residual
from gdd_fast.ops.attention import Order, attention_ref
from gdd_fast.ops.resample2d import resample2d_ref

EDM = {"ncsnpp-32": (978, 592), "adm-64": (1709, 840)}
"""All operators, and those that compute."""


@dataclasses.dataclass
class Count:
    """Operators dispatched, by name; `compute` leaves out views."""

    operators: Counter
    views: int

    @property
    def total(self) -> int:
        return self.operators.total()

    @property
    def compute(self) -> int:
        return self.total - self.views


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = Count(Counter(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))  # a fake tensor asked for its device, which costs a real one nothing
        self.count.operators[str(func)] += 1
        aliases = [result.alias_info for result in func._schema.returns]
        self.count.views += any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def count(function: Callable[..., Tensor], *inputs: Tensor | None) -> Count:
    """What `function(*inputs)` dispatches, after a first call that does not count."""
    with torch.no_grad():
        function(*inputs)
        with _Counter() as counter:
            function(*inputs)
    return counter.count


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Networks called in this block run the definition of every operator, seen by the dispatcher one by one."""

    def norm(*arguments, statistics=None, backend: str, **options) -> Tensor:
        return group_norm_silu.group_norm_silu_ref(*arguments, **options)

    def merged(*arguments, statistics: bool = False, backend: str, **options) -> Tensor:
        return residual.residual_ref(*arguments, **options)

    def resample(*arguments, backend: str, **options) -> Tensor:
        return resample2d_ref(*arguments, **options)

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0, backend: str = "") -> Tensor:
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=padding)

    def attend(qkv: Tensor, num_heads: int, order: Order, backend: str) -> Tensor:
        return attention_ref(qkv, num_heads, order)

    def never_fused(norm: GroupNorm, x: Tensor | Pair) -> bool:
        return False

    with (
        mock.patch.object(group_norm_silu, "group_norm_silu", norm),
        mock.patch.object(GroupNorm, "is_fused", never_fused),
        mock.patch.object(residual, "residual", merged),
        mock.patch.object(convolution, "resample2d", resample),
        mock.patch.object(convolution, "frozen_conv2d", conv2d),
        mock.patch.object(self_attention, "frozen_conv2d", conv2d),
        mock.patch.object(self_attention, "attention", attend),
    ):
        yield


def build(name: str, channels: int, dtype: torch.dtype = torch.float32) -> GDDPrecond:
    """A network of NETWORKS with another number of channels, its weights frozen."""
    resolution, arguments = NETWORKS[name]
    arguments = {**arguments, "dropout": 0.0, "model_channels": channels}
    return GDDPrecond(resolution, 3, dtype=dtype, **arguments).eval().requires_grad_(False)


def inputs(net: GDDPrecond, device: str, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Latents, and classes if the network has any."""
    latents = torch.zeros(batch, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    return latents, torch.zeros(batch, dtype=torch.int64, device=device) if net.label_dim else None


def of_plain(name: str, channels: int = 64) -> Count:
    """The network as a user of plain PyTorch has it, in bfloat16 with float32 weights, on the CPU."""
    net = build(name, channels, torch.bfloat16)
    latents, classes = inputs(net, "cpu")
    labels = None if classes is None else F.one_hot(classes, net.label_dim).float()
    with plain_pytorch():
        return count(lambda z: net(z * SIGMA, torch.tensor(SIGMA), labels), latents)


@contextlib.contextmanager
def fake_engine(name: str, channels: int) -> Iterator[tuple[GDDPrecond, FoldedUNet, Conditioning | None]]:
    """The plain network, and folded in bfloat16 as for a GPU, the latter of fake tensors there."""
    target = dataclasses.replace(
        make_target(torch.device("cpu"), torch.bfloat16),
        convolve="plain",
        layout=torch.channels_last,
        late_bias=True,
        norm="triton",
        residual="triton",
        resample="cuda",
        attention="torch",  # its "auto" asks which GPU it is
    )
    net = build(name, channels)
    unet, conditioning = fold(net, target)
    with FakeTensorMode():
        for module in (unet, conditioning):
            if module is not None:
                module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        yield net, unet, conditioning


def of_engine(name: str, device: str, channels: int = 64) -> Count:
    """The folded network in bfloat16 on "cpu", or on "cuda" with its default operators."""
    if device == "cuda":
        engine = fake_engine(name, channels)
    else:
        net = build(name, channels)
        engine = contextlib.nullcontext((net, *fold(net, make_target(torch.device(device), torch.bfloat16))))
    with engine as (net, unet, conditioning):
        latents, classes = inputs(net, device)
        return count(lambda z, c: unet(z, None if conditioning is None else conditioning(c)), latents, classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.dispatched", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--operators", action="store_true", help="also list the engine's operators by name")
    options = parser.parse_args()
    print(f"{'operators per forward (compute)':<32}{'all':>8}{'compute':>10}{'% of EDM':>10}")
    for name, (total, compute) in EDM.items():
        print(f"{name + ', EDM':<32}{total:>8}{compute:>10}{'':>10}")
        rows = {"plain": of_plain(name), "engine, GPU": of_engine(name, "cuda"), "engine, CPU": of_engine(name, "cpu")}
        for label, row in rows.items():
            share = 100 * row.total / total
            print(f"{name + ', ' + label:<32}{row.total:>8}{row.compute:>10}{share:>10.1f}", flush=True)
            if options.operators and label.startswith("engine"):
                for operator, times in row.operators.most_common():
                    print(f"    {times:>6} {operator}")


if __name__ == "__main__":
    main()
