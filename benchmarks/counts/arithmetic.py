"""`python -m benchmarks.counts.arithmetic`: what a GPU's data sheet allows the engine. A prediction, no measurement.

The folded network runs on fake tensors as it would on an H200, and every operator is taken apart into the kernels that
it launches. A convolution's bias is a kernel of its own, so are the second product of a pair and, where a norm is split
over programs, the statistics that did not come with its map. A kernel takes at least the largest of its FLOP by the
peak, the bytes of its inputs and results by the bandwidth, and LAUNCH, which is what a small kernel of a CUDA graph
takes from one to the next. "By tiles" gives products only the multiprocessors that their tiles can fill.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.counts.dispatched import fake_engine, inputs, is_view
from benchmarks.counts.launches import PROGRAMS, recording
from gdd_fast.ops._memory_format import statistics_parts

PEAK = 989e12
"""FLOP a second of an H200's tensor cores in bfloat16, dense, by its data sheet."""
BANDWIDTH = 4.8e12
"""Bytes a second of its memory."""
LAUNCH = 2.5e-6
"""Seconds; 2 to 3 microseconds are usual."""
MULTIPROCESSORS = PROGRAMS[90] // 2
TILE = 128
"""Rows and columns of a product that one multiprocessor computes at a time."""


@dataclass(frozen=True)
class Kernel:
    """What one launch has to do; a product has `rows` x `columns` results."""

    bytes: float
    flop: float = 0.0
    rows: int = 0
    columns: int = 0

    def seconds(self, *, tiled: bool) -> float:
        """The least time."""
        tiles = -(-self.rows // TILE) * -(-self.columns // TILE)
        filled = min(1.0, tiles / MULTIPROCESSORS) if tiled and tiles else 1.0
        return max(self.flop / (PEAK * filled), self.bytes / BANDWIDTH, LAUNCH)


class _Arithmetic(TorchDispatchMode):
    """Collects the kernels of what runs in it, by kind of operator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: defaultdict[str, list[Kernel]] = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace != "prim" and not is_view(function):
            results = result if isinstance(result, tuple) else (result,)
            kind, kernels = _kernels(function.name().split("::")[1], args, results)
            self.kernels[kind] += kernels
        return result


def _kernels(name: str, args: tuple, results: tuple[Tensor, ...]) -> tuple[str, list[Kernel]]:
    """The kind of an operator, and the kernels that it launches."""
    out, size = results[0], _size(*args, *results)
    rows, columns = (out.shape[0] * out.shape[2:].numel(), out.shape[1]) if out.dim() == 4 else (0, 0)
    match name:
        case "convolution":
            weight, bias = args[1:3]
            product = Kernel(size, 2.0 * out.numel() * weight.shape[1:].numel(), rows, columns)
            return "3x3 convolutions", [product, *[Kernel(2 * out.nbytes)] * (bias is not None)]
        case "pointwise":
            x, skip, _, _ = args
            flop = 2.0 * out.numel()
            kernels = [Kernel(size - _size(skip), flop * x.shape[1], rows, columns)]
            if skip is not None:
                kernels.append(Kernel(_size(skip, out, out), flop * skip.shape[1], rows, columns))
            return "1x1 products", kernels
        case "attention_inference":
            pixels = out.shape[2:].numel()
            return "attention", [Kernel(size, 4.0 * out.numel() * pixels, rows * args[1], 1)]
        case "group_norm_silu":
            before = _norm_launches(args) - 1
            return "norms", [*[Kernel(_size(*args[:2]) / max(before, 1))] * before, Kernel(size)]
    return {"residual": "residuals", "resample2d": "resampling"}.get(name, "other"), [Kernel(size)]


def _size(*values: object) -> float:
    """Bytes of all tensors among these."""
    return float(sum(value.nbytes for value in values if isinstance(value, Tensor)))


def _norm_launches(args: tuple) -> int:
    """How many kernels the launcher of `group_norm_silu` launches for a call of the operator, on an H200."""
    from gdd_fast.kernels import group_norm_silu as kernels

    x, skip, groups, weight, bias, eps, add, scale, shift, silu, known, skip_known, _ = args
    n, _, h, w = x.shape
    like = lambda t: None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta")
    last = lambda c: torch.empty((n, c, h, w), dtype=x.dtype, device="meta", memory_format=torch.channels_last)
    maps = last(x.shape[1]), None if skip is None else last(skip.shape[1])
    rows = [like(t) for t in (add, scale, shift)]
    with recording(kernels, 90) as launched:
        kernels.forward(
            *maps, groups, like(weight), like(bias), eps, *rows, like(known), like(skip_known), silu,
            last(weight.shape[0]), statistics_parts(h * w),
        )  # fmt: skip
    return len(launched)


def arithmetic(name: str, batches: Sequence[int], channels: int | None = None) -> dict[int, dict[str, list[Kernel]]]:
    """The kernels of a forward pass by batch and kind of operator, for a network of NETWORKS, or one so wide.

    Triton must not be interpreting: set TRITON_INTERPRET=0 before it is imported.
    """
    found = {}
    with (
        fake_engine(name, channels or NETWORKS[name][1]["model_channels"]) as (net, unet, conditioning),
        torch.no_grad(),
    ):
        for batch in batches:
            latents, classes = inputs(net, "cuda", batch)
            rows = None if conditioning is None else conditioning(classes)
            with _Arithmetic() as counted:
                unet(latents, rows)
            found[batch] = dict(counted.kernels)
    return found


def table(name: str, batch: int, kinds: dict[str, list[Kernel]]) -> str:
    """As Markdown, the most expensive kind first."""
    least = lambda kernels, tiled: sum(kernel.seconds(tiled=tiled) for kernel in kernels)
    head = f"| {name}, batch {batch} | kernels | GFLOP | MB | least ms | ms by tiles |\n|---|---|---|---|---|---|"
    everything = [kernel for kernels in kinds.values() for kernel in kernels]
    lines = [head]
    ordered = sorted(kinds.items(), key=lambda item: -least(item[1], True))
    for kind, kernels in [*ordered, ("all", everything)]:
        flop, size = sum(k.flop for k in kernels) / 1e9, sum(k.bytes for k in kernels) / 1e6
        times = " | ".join(f"{1e3 * least(kernels, tiled):.3g}" for tiled in (False, True))
        lines.append(f"| {kind} | {len(kernels)} | {flop:.4g} | {size:.4g} | {times} |")
    rates = [f"{batch / least(everything, tiled):,.0f}" for tiled in (False, True)]
    return "\n".join([*lines, f"\nAt most {rates[0]} images/s, and {rates[1]} by tiles.\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.arithmetic", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("networks", nargs="*", default=["ncsnpp-32", "adm-64"], help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    options = parser.parse_args()
    for name in options.networks:
        for batch, kinds in arithmetic(name, options.batches).items():
            print(table(name, batch, kinds), flush=True)


if __name__ == "__main__":
    main()
