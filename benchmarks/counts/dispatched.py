"""`python -m benchmarks.counts.dispatched`: operators dispatched in a forward pass, stock network against engine.

Every call that reaches PyTorch's dispatcher from Python is counted, views of memory among them ("compute" leaves them
out). What an operator calls inside, ours or PyTorch's, is not. Of EDM's networks:

    EDM         EDM's own code, counted once in the same way with PyTorch 2.13 (it is no part of this project)
    plain       the same on PyTorch's own operators, as the benchmarks' peers have it
    engine      what OneStepGenerator runs, on a GPU and on a CPU

and of google/ddpm-cifar10-32, where diffusers is installed: diffusers' own forward, and the engine.

The GPU's count needs none: tensors are fake, those that torch.compile traces with, and operators are called as they
would be. The CPU's is of real calls. The networks have all their layers, with fewer channels.
"""

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.counts.saved_bytes import DDPM_CIFAR10
from benchmarks.counts.step_kernels import on_a_gpu
from benchmarks.peers.stock_unet import BEST, StockGenerator
from gdd_fast.engine.fold import SIGMA, Conditioning, fold, make_target
from gdd_fast.engine.folded_unet import FoldedUNet
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.teachers.unet2d import UNet2DPrecond

EDM = {"ncsnpp-32": (978, 592), "adm-64": (1709, 840)}
"""All operators, and those that compute."""
DIFFUSERS = "ddpm-cifar10-32"


class Count(TorchDispatchMode):
    """Operators dispatched within it, by name; `compute` leaves out views."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter = Counter()
        self.views = 0

    @property
    def total(self) -> int:
        return self.operators.total()

    @property
    def compute(self) -> int:
        return self.total - self.views

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":  # a fake tensor asked for its device, which costs a real one nothing
            self.operators[str(func)] += 1
            self.views += is_view(func)
        return func(*args, **(kwargs or {}))


def is_view(operator: OpOverload) -> bool:
    """Whether an operator returns memory of its inputs and writes none of it."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)


def count(function: Callable[..., Tensor], *inputs: Tensor | None) -> Count:
    """What `function(*inputs)` dispatches, after a first call that does not count."""
    with torch.no_grad():
        function(*inputs)
        with Count() as counted:
            function(*inputs)
    return counted


def build(name: str, channels: int, dtype: torch.dtype = torch.float32) -> Preconditioned:
    """A network of NETWORKS, or DIFFUSERS, with another number of channels, its weights frozen."""
    if name == DIFFUSERS:
        widths = [channels * width // 128 for width in DDPM_CIFAR10["block_out_channels"]]
        unet = {**DDPM_CIFAR10, "block_out_channels": widths}
        return UNet2DPrecond(unet, {"kind": "vp"}, dtype=dtype).eval().requires_grad_(False)
    resolution, arguments = NETWORKS[name]
    arguments = {**arguments, "dropout": 0.0, "model_channels": channels}
    return GDDPrecond(resolution, 3, dtype=dtype, **arguments).eval().requires_grad_(False)


def inputs(net: Preconditioned, device: str, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Latents, and classes if the network has any."""
    latents = torch.zeros(batch, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    return latents, torch.zeros(batch, dtype=torch.int64, device=device) if net.label_dim else None


def of_plain(name: str, channels: int = 64) -> Count:
    """The network as a user of plain PyTorch has it, in bfloat16 with float32 weights, on the CPU.

    DIFFUSERS is diffusers' own forward, in float32.
    """
    net = build(name, channels, torch.bfloat16)
    latents, classes = inputs(net, "cpu")
    if name == DIFFUSERS:
        return count(lambda z: net.model(z, torch.tensor(10)).sample, latents)
    labels = None if classes is None else F.one_hot(classes, net.label_dim).float()
    stock = StockGenerator(net, BEST, torch.bfloat16)
    return count(lambda z: stock(z * SIGMA, torch.tensor(SIGMA), labels), latents)


@contextlib.contextmanager
def fake_engine(name: str, channels: int) -> Iterator[tuple[Preconditioned, FoldedUNet, Conditioning | None]]:
    """The plain network, and folded in bfloat16 as for a GPU, the latter of fake tensors there."""
    target = dataclasses.replace(
        make_target(torch.device("cpu"), torch.bfloat16),
        convolve="plain",
        winograd=False,
        small=False,
        layout=torch.channels_last,
        late_bias=True,
        norm="triton",
        residual="triton",
        statistics=True,
        resample="cuda",
        attention="torch",  # its "auto" asks which GPU it is
    )
    net = build(name, channels)
    unet, conditioning = fold(net, target)
    with FakeTensorMode(), on_a_gpu():
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
    print(f"{'operators per forward (compute)':<32}{'all':>8}{'compute':>10}{'% of the first':>16}")
    for name, (total, compute) in EDM.items():
        print(f"{name + ', EDM':<32}{total:>8}{compute:>10}")
        _print_rows(name, {"plain": of_plain(name)}, total, options.operators)
    stock = of_plain(DIFFUSERS)
    print(f"{DIFFUSERS + ', diffusers':<32}{stock.total:>8}{stock.compute:>10}")
    _print_rows(DIFFUSERS, {}, stock.total, options.operators)


def _print_rows(name: str, rows: dict[str, Count], total: int, operators: bool) -> None:
    rows |= {"engine, GPU": of_engine(name, "cuda"), "engine, CPU": of_engine(name, "cpu")}
    for label, row in rows.items():
        print(f"{name + ', ' + label:<32}{row.total:>8}{row.compute:>10}{100 * row.total / total:>16.1f}", flush=True)
        if operators and label.startswith("engine"):
            for operator, times in row.operators.most_common():
                print(f"    {times:>6} {operator}")


if __name__ == "__main__":
    main()
