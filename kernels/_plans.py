"""Describes launches once, to be repeated from C++ (csrc/launch_plan.h) without Triton's work in every call.

An operator's launchers run unchanged, but `_launch.launch` only notes what they would launch. The identities of the
tensors passed to kernels tell which are inputs and which are results or workspaces made on the way.
"""

import contextlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._launch import Launch, noting

# The memory formats of Triton's types for numbers.
_BITS = {"i1": "<i", "i32": "<i", "i64": "<q", "u1": "<I", "u32": "<I", "u64": "<Q", "fp32": "<f", "f32": "<f"}


def plan(call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor | None]) -> tuple[int, list[Tensor], list]:
    """(number of results, tensors like those to be made, launches): what `call()`, which returns the results, launches
    on `inputs`. Nothing is launched. Results that are themselves inputs are left out.

    A launch is a function of all tensors, inputs first, where the kernels are interpreted; else (handle, grid, threads,
    shared memory, arguments), an argument being (index of a tensor, 0) or (-1, its bits).

    Raises AssertionError for a kernel that cannot be repeated like this, or that reads something computed otherwise.
    """
    device = next(t.device for t in inputs if t is not None)
    given = {id(t): i for i, t in enumerate(inputs) if t is not None}
    with noting() as noted:
        results = [t for t in call() if id(t) not in given]
    made = results + [t for t in noted.workspaces if all(t is not r for r in results)]
    known = given | {id(t): len(inputs) + i for i, t in enumerate(made)}
    handed = {id(a) for launch in noted.launches for a in launch.arguments if isinstance(a, Tensor)}
    assert handed <= known.keys(), "a kernel reads what was computed on the way"
    assert all(id(t) in handed or not t.numel() for t in results), "a result is computed otherwise"
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return len(results), made, [_described(launch, known) for launch in noted.launches]


def _described(launch: Launch, known: dict[int, int]) -> Any:
    from triton.runtime.jit import JITFunction

    arguments = [("tensor", known[id(a)]) if isinstance(a, Tensor) else ("value", a) for a in launch.arguments]
    if not isinstance(launch.kernel, JITFunction):
        kernel, grid, options = launch.kernel, launch.grid, launch.options  # not the launch, which holds tensors

        def interpreted(tensors: list[Tensor | None]) -> None:
            kernel[grid](*[tensors[a] if kind == "tensor" else a for kind, a in arguments], **options)

        return interpreted
    compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    compiled._init_handles()
    m = compiled.metadata
    plain = m.num_ctas == 1 and not (m.launch_cooperative_grid or m.launch_pdl)
    assert plain and not (m.global_scratch_size or m.profile_scratch_size), f"{m.name} is launched in a way of its own"
    packed = []
    types = compiled.src.signature
    names = [p.name for p in launch.kernel.params]
    values = dict(zip(names, arguments, strict=False))
    values |= {name: ("value", value) for name, value in launch.options.items() if name in names}
    for name in names:
        if types[name] == "constexpr":
            continue
        kind, value = values[name]
        packed.append((value, 0) if kind == "tensor" else (-1, _bits(types[name], value)))
    grid = (*launch.grid, 1, 1)[:3]
    return compiled.function, grid, 32 * m.num_warps, m.shared, packed


def _bits(kind: str, value: Any) -> int:
    return int.from_bytes(struct.pack(_BITS[kind], value), "little")
