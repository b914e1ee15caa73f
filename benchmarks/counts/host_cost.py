"""`python -m benchmarks.counts.host_cost`: what a call costs the host, fused operators against PyTorch's own layers.

CPU time per call in microseconds, the least of many, with launches stubbed (benchmarks/counts/host_gpu.py): of a fused
operator, all but the driver's own work. PyTorch's layers compute on tiny CPU tensors, so their rows hold the
dispatcher's and autograd's work as on a GPU, some microseconds of arithmetic, and none of the launches that a GPU would
need for each of their kernels; what a stubbed kernel leaves unwritten may hold denormal numbers, on which processors
are slow, so these count as 0. Both sides alternate in one run. "Triton's launcher" is the same call launched by Triton
itself, through torch.library, as where gdd_fast._C is not built.

    forward     without gradients
    both        forward and backward, by torch.autograd.grad, of every differentiable input

`--network`: google/ddpm-cifar10-32's architecture (diffusers' UNet2DModel, all its layers, few channels and pixels), as
it is and accelerated, at batch 1: a forward pass without gradients, and forward and backward with gradients of all
parameters, and of its first convolution's alone (all others are frozen).
"""

import argparse
import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

CHANNELS = 32


@dataclass(frozen=True)
class Row:
    """A call by our operator and by PyTorch's own; `inputs` are those that gradients are taken of."""

    name: str
    ours: Callable
    theirs: Callable
    inputs: list


def rows(size: int = 4, batch: int = 1) -> list[Row]:
    """Each on maps (batch, 32, size, size), channels_last, in float32 unless said otherwise."""
    import torch
    from torch.nn import functional as F

    from gdd_fast.ops.frozen_conv2d_relu import frozen_conv2d_relu
    from gdd_fast.ops.group_norm_silu import group_norm_silu
    from gdd_fast.ops.max_pool2x2 import max_pool2x2
    from gdd_fast.ops.residual import residual

    generator = torch.Generator().manual_seed(0)

    def maps(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x = torch.randn((batch, CHANNELS, size, size), generator=generator).to(dtype)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def row() -> torch.Tensor:
        return torch.randn(CHANNELS, generator=generator).requires_grad_()

    weight = torch.randn((CHANNELS, CHANNELS, 3, 3), generator=generator).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(CHANNELS, generator=generator)
    half, embedding = torch.bfloat16, torch.randn((batch, CHANNELS), generator=generator).to(torch.bfloat16)
    scale = math.sqrt(0.5)

    def their_norm(x, w, b):
        return F.silu(F.group_norm(x, 8, w, b, 1e-6))

    def their_embedded_norm(x, w, b, add):
        # as EDM's own code has it, weights cast in every call
        x = x + add[:, :, None, None]
        return F.silu(F.group_norm(x, 8, w.to(x.dtype), b.to(x.dtype), 1e-6))

    def our_embedded_norm(x, w, b, add):
        return group_norm_silu(x, 8, w, b, 1e-6, add=add, backend="triton")

    return [
        Row("group_norm_silu", lambda x, w, b: group_norm_silu(x, 8, w, b, 1e-6, backend="triton"), their_norm,
            [maps(), row(), row()]),
        Row("group_norm_silu, bf16, with an embedding", our_embedded_norm, their_embedded_norm,
            [maps(half), row(), row(), embedding.requires_grad_()]),
        Row("residual", lambda h, skip: residual(h, skip, scale=scale, backend="triton"),
            lambda h, skip: (h + skip) * scale, [maps(), maps()]),
        Row("frozen_conv2d_relu", lambda x: frozen_conv2d_relu(x, weight, bias, padding=1, backend="triton"),
            lambda x: F.relu(F.conv2d(x, weight, bias, padding=1)), [maps()]),
        Row("max_pool2x2", lambda x: max_pool2x2(x, backend="triton"), lambda x: F.max_pool2d(x, 2), [maps()]),
    ]  # fmt: skip


def least(*functions: Callable[[], object], rounds: int = 30, calls: int = 100) -> list[float]:
    """Microseconds of CPU time per call of each, the least of `rounds` means over `calls`; the functions take turns."""
    best = [math.inf] * len(functions)
    for function in functions:
        for _ in range(20):
            function()
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            for _ in range(calls):
                function()
            best[i] = min(best[i], (time.process_time() - start) / calls * 1e6)
    return best


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Operators as where the extension is not built."""
    from gdd_fast.ops import frozen_conv2d_relu, group_norm_silu, max_pool2x2, relu_bits, residual

    with contextlib.ExitStack() as stack:
        for module in (frozen_conv2d_relu, group_norm_silu, max_pool2x2, relu_bits, residual):
            stack.enter_context(mock.patch.object(module, "wanted", lambda x, backend: False))
        yield


def measure(rounds: int = 30) -> list[dict]:
    """{"operator", "pass", "pytorch", "gdd_fast", "triton's launcher"} by row and direction."""
    import torch

    from benchmarks.counts.host_gpu import stubbed
    from benchmarks.harness.timing import reuse_memory

    torch.set_num_threads(1)
    reuse_memory()  # as a GPU's stays in PyTorch's cache: no page to map again
    found = []
    with stubbed():
        for row in rows():
            gradient = torch.ones_like(row.theirs(*row.inputs))

            def forward(function, row=row):
                return function(*row.inputs)

            def both(function, row=row, gradient=gradient):
                return torch.autograd.grad(function(*row.inputs), row.inputs, gradient)

            for name, run in (("forward", forward), ("both", both)):
                with torch.set_grad_enabled(name == "both"):
                    pytorch, ours = least(lambda: run(row.theirs), lambda: run(row.ours), rounds=rounds)  # noqa: B023
                    with without_plans():
                        (slow,) = least(lambda: run(row.ours), rounds=max(rounds // 3, 1))  # noqa: B023
                found.append({"operator": row.name, "pass": name, "pytorch": pytorch, "gdd_fast": ours, "triton": slow})
    return found


def network(rounds: int = 10) -> tuple[dict[str, list[float]], int, int]:
    """Milliseconds of host time by pass, original and accelerated; launches without gradients, modules replaced."""
    import torch

    import gdd_fast
    from benchmarks.counts.host_gpu import stubbed
    from benchmarks.counts.saved_bytes import DDPM_CIFAR10
    from benchmarks.harness.operator_case import package
    from benchmarks.harness.timing import reuse_memory

    torch.set_num_threads(1)
    reuse_memory()  # as a GPU's stays in PyTorch's cache: no page to map again
    few = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "sample_size": 8}
    net = package("diffusers").UNet2DModel(**DDPM_CIFAR10 | few).eval()
    x, time_step = torch.randn(1, 3, 8, 8), torch.tensor(10)

    def run(net: torch.nn.Module) -> None:
        y = net(x, time_step).sample
        if y.requires_grad:
            torch.autograd.grad(y, [p for p in net.parameters() if p.requires_grad], y.detach())

    times = {}
    trained = {"all but one layer frozen": ["conv_in"], "all gradients": ["conv_in", ""], "no gradients": []}
    # a trial compares numbers, which a stub does not make
    with stubbed() as stub, mock.patch("gdd_fast.acceleration.replacements.difference", lambda *arguments: None):
        for name, layers in trained.items():
            net.requires_grad_(False)
            for layer in layers:
                net.get_submodule(layer).requires_grad_(True)
            fast, report = gdd_fast.accelerate(copy.deepcopy(net), backend="triton", report=True)
            with torch.set_grad_enabled(bool(layers)):
                before = stub.launches
                run(fast)
                launched = stub.launches - before
                found = least(lambda: run(net), lambda: run(fast), rounds=rounds, calls=10)  # noqa: B023
            times[name] = [t / 1e3 for t in found]
    return times, launched, len(report.replaced)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.host_cost", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--network", action="store_true", help="a whole network, as it is and accelerated")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    os.environ["TRITON_INTERPRET"] = "0"
    if options.network:
        times, launched, replaced = network(options.rounds)
        print(f"ddpm-cifar10-32 at batch 1, {replaced} modules replaced, {launched} launches of ours; ms of host time:")
        for name, (original, fast) in times.items():
            print(f"{name}: original {original:.2f}, accelerated {fast:.2f} ({fast / original:.2f} of it)")
        return
    found = measure(options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'us of CPU per call':<44}{'pass':<9}{'PyTorch':>9}{'gdd_fast':>10}{'times':>7}{'by Triton':>11}")
    for row in found:
        times = row["gdd_fast"] / row["pytorch"]
        print(
            f"{row['operator']:<44}{row['pass']:<9}{row['pytorch']:>9.1f}{row['gdd_fast']:>10.1f}{times:>7.2f}"
            f"{row['triton']:>11.1f}"
        )


if __name__ == "__main__":
    main()
