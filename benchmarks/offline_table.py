"""What the assembler says of every Triton kernel of the networks, without a GPU: registers, spills, shared memory.

    python -m benchmarks.offline_table                writes docs/kernels_table.md
    python -m benchmarks.offline_table --sample 20    every 20th kernel, printed

The launchers themselves are run, on meta tensors, for every layer of the networks (benchmarks/shapes.py) at several
batch sizes, dtypes and memory formats; what they would launch is recorded with Triton's own specialisation of arguments
and compiled for sm_80 and sm_90 as an A100 and an H100 would have it.
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import NormCall, ResidualCall, norm_calls, residual_calls
from tests.offline import Resources, TritonCase, compile_triton

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernels_table.md"
BATCHES = (1, 8, 64, 512)
DTYPES = (torch.bfloat16, torch.float32)
PROGRAMS = {80: 2 * 108, 90: 2 * 132}  # as programs_wanted has it on an A100 and an H100 or H200
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: `case` is what is compiled; `used_by` says where it comes from first."""

    module: str
    case: TritonCase
    used_by: str


class _Recorder:
    """Stands in for a @triton.jit function: keeps what it would be launched with."""

    def __init__(self, kernel: Any, found: list[TritonCase]) -> None:
        self.kernel = kernel
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]):
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        parameters = self.kernel.params
        values = dict(zip((p.name for p in parameters), args, strict=False))
        options = {k: v for k, v in kwargs.items() if k not in {p.name for p in parameters}}
        values |= {k: v for k, v in kwargs.items() if k not in options}
        signature, constants, divisible = {}, {}, []
        for p in parameters:
            value = values[p.name]
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                constants[p.name] = value
            elif isinstance(value, Tensor):
                signature[p.name] = _TYPES[value.dtype]
                divisible.append(p.name)  # torch's allocations are aligned
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(p.name)
        name = self.kernel.__name__
        self.found.append(TritonCase(name, signature, constants, options, tuple(divisible)))


@contextlib.contextmanager
def recording(module: Any, programs: int) -> Iterator[list[TritonCase]]:
    """Kernels of `module` are recorded instead of launched, as on a device that wants `programs` programs."""
    found: list[TritonCase] = []
    before = dict(vars(module))
    kernels = {name: value for name, value in before.items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, found))
        if "programs_wanted" in before:
            module.programs_wanted = lambda _: programs
        yield found
    finally:
        for name in (*kernels, "programs_wanted"):
            if name in before:
                setattr(module, name, before[name])


def launches(
    norms: Iterable[NormCall], residuals: Iterable[ResidualCall], architecture: int, batches: Iterable[int] = BATCHES
) -> list[Launch]:
    """Every distinct kernel that training and sampling with these layers launch on `architecture`."""
    from gdd_fast.kernels import group_norm_silu, residual

    found: dict[str, Launch] = {}
    norms, residuals = list(norms), list(residuals)
    programs = PROGRAMS[architecture]
    for batch in batches:
        for dtype in DTYPES:
            for memory_format in (torch.channels_last, torch.contiguous_format):
                for module, calls, run in (
                    (group_norm_silu, norms, _run_norm),
                    (residual, residuals, _run_residual),
                ):
                    for one in calls:
                        with recording(module, programs) as cases:
                            run(module, one, batch, dtype, memory_format)
                        layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
                        channels = one.channels if isinstance(one.channels, int) else "+".join(map(str, one.channels))
                        where = f"{batch}x{channels}x{one.resolution}² {str(dtype)[6:]} {layout}"
                        for case in cases:
                            key = json.dumps(
                                [case.kernel, case.signature, case.constants, case.options, case.divisible]
                            )
                            found.setdefault(key, Launch(module.__name__, case, where))
    return list(found.values())


def _run_norm(module: Any, one: NormCall, batch: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Forward and backward of a training step with every gradient."""
    size = (one.resolution, one.resolution)
    maps = [_map(batch, c, size, dtype, memory_format) for c in one.channels]
    x, skip = maps if len(maps) == 2 else (maps[0], None)
    c = sum(one.channels)
    y = _map(batch, c, size, dtype, memory_format)
    weight, bias = (torch.empty(c, device="meta") for _ in range(2))
    rows = [torch.empty((batch, c), device="meta") if given else None for given in (one.add, one.scale, one.scale)]
    parts = min(max(math.prod(size) // 64, 1), 16)
    mean, rstd = module.forward(x, skip, one.num_groups, weight, bias, 1e-6, *rows, None, None, one.silu, y, parts)
    per_sample = [torch.empty((batch, c), device="meta") for _ in range(2)]
    gradients = (y[:, : x.shape[1]], skip, *_like(rows[:1]), *per_sample, *_like(rows[1:]))
    module.backward(y, x, skip, weight, bias, *rows, mean, rstd, one.silu, *gradients)


def _like(rows: list[Tensor | None]) -> list[Tensor | None]:
    return [None if row is None else torch.empty_like(row) for row in rows]


def _run_residual(
    module: Any, one: ResidualCall, batch: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    size = (one.resolution, one.resolution)
    h = _map(batch, one.channels, size, dtype, memory_format)
    parts = min(max(math.prod(size) // 64, 1), 16)
    for statistics in (None, torch.empty((batch, parts, 2, one.channels), device="meta")):
        module.residual(h, h, None, math.sqrt(0.5), h, statistics)


def _map(n: int, c: int, size: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.empty((n, c, *size), dtype=dtype, device="meta", memory_format=memory_format)


def compile_launches(found: list[Launch], architecture: int) -> list[tuple[Launch, Resources]]:
    """Each launch with its resources."""
    results = []
    for module in dict.fromkeys(launch.module for launch in found):
        own = [launch for launch in found if launch.module == module]
        resources = compile_triton(module, [launch.case for launch in own], [architecture])
        results += zip(own, resources, strict=True)
    return results


def rows(results: list[tuple[Launch, Resources]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| kernel | tile | warps | sm | registers | spilled | shared | first layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for launch, r in results:
        c = launch.case.constants
        tile = f"{c.get('BLOCK_S')} x {c.get('BLOCK_C')}"
        lines.append(
            f"| {r.kernel} | {tile} | {launch.case.options.get('num_warps')} | {r.architecture} | {r.registers} "
            f"| {r.spilled} | {r.shared} | {launch.used_by} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="compile every Nth kernel only, and print")
    parser.add_argument("--architectures", type=int, nargs="+", default=sorted(PROGRAMS))
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    results = []
    for architecture in args.architectures:
        found = launches(norm_calls(), residual_calls(), architecture)
        print(f"sm_{architecture}: {len(found)} kernels", flush=True)
        results += compile_launches(found[:: args.sample], architecture)
    text = "\n".join(rows(results))
    spilling = [r for _, r in results if r.spilled]
    print(text if args.sample > 1 else f"{len(results)} kernels, {len(spilling)} spill")
    if args.sample == 1:
        made_by = "Made by `python -m benchmarks.offline_table`: every Triton kernel that the networks' layers launch."
        head = f"# Kernels as compiled\n\n{made_by}\n\n"
        TABLE.write_text(f"{head}{text}\n", encoding="utf-8")
    raise SystemExit(1 if spilling else 0)


if __name__ == "__main__":
    main()
