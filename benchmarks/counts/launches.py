"""What the networks launch: every Triton kernel with the specialisation of its arguments, recorded without a GPU.

The launchers themselves run, on meta tensors, for every layer of the networks (benchmarks/cases/layer_calls.py), at
batches of 1, 16 and 256 (what is launched depends on whether the samples alone fill the device): in channels_last
memory, in which the networks train and sample, and in contiguous memory, which other people's networks have
(gdd_fast.accelerate). float16 is cut as bfloat16 is. In place of a kernel stands a recorder, which notes what Triton
would compile for the arguments it is given.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.layer_calls import AttentionCall, Layers, NormCall, ReluCall
from benchmarks.counts.offline import TritonCase
from gdd_fast.ops._memory_format import statistics_parts

OPERATORS = ("group_norm_silu", "residual", "attention", "relu_bits", "max_pool2x2")
BATCHES = (1, 16, 256)
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# By architecture: what programs_wanted answers on an A100 and on an H100 or H200.
PROGRAMS = {80: 2 * 108, 90: 2 * 132}
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel of gdd_fast.kernels.<operator>.

    `first` names a layer that launches it, `architectures` are those it is launched on.
    """

    operator: str
    case: TritonCase
    first: str
    architectures: tuple[int, ...]

    @property
    def key(self) -> str:
        """A digest of all that Triton compiles a kernel anew for, less the architecture."""
        case = self.case
        text = json.dumps([self.operator, *dataclasses.astuple(case)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Recorder:
    """Stands in for a @triton.jit function: keeps what it would be compiled for."""

    def __init__(self, kernel: Any, found: list[TritonCase]) -> None:
        self.kernel = kernel
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**31 for size in grid), f"{self.kernel.__name__} cannot have a grid of {grid}"
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        names = [p.name for p in self.kernel.params]
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        signature, constants, divisible = {}, {}, []
        for p in self.kernel.params:
            value, specialize = values[p.name], not p.do_not_specialize
            if p.is_constexpr or value is None or (specialize and isinstance(value, int) and value == 1):
                constants[p.name] = value
            elif isinstance(value, Tensor):
                signature[p.name] = _TYPES[value.dtype]
                divisible.append(p.name)  # torch's allocations are aligned
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialize and value % 16 == 0:
                    divisible.append(p.name)
        self.found.append(TritonCase(self.kernel.__name__, signature, constants, options, tuple(divisible)))


@contextlib.contextmanager
def recording(module: ModuleType, architecture: int) -> Iterator[list[TritonCase]]:
    """Kernels of `module` are recorded instead of launched, as on a GPU of `architecture` (of PROGRAMS)."""
    from gdd_fast.kernels._launch import options_on

    found: list[TritonCase] = []
    replaced = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    substitutes = {name: _Recorder(kernel, found) for name, kernel in replaced.items()}
    substitutes["programs_wanted"] = lambda _: PROGRAMS[architecture]
    substitutes["configuration"] = lambda operator, _, shape=(): options_on(f"sm_{architecture}", operator, shape)
    substitutes = {name: value for name, value in substitutes.items() if hasattr(module, name)}
    replaced = {name: getattr(module, name) for name in substitutes}
    try:
        vars(module).update(substitutes)
        yield found
    finally:
        vars(module).update(replaced)


def launches(layers: Layers, architecture: int) -> dict[str, Launch]:
    """Every distinct kernel that training and sampling with these layers launch on `architecture`, by `Launch.key`.

    Triton must not be interpreting: set TRITON_INTERPRET=0 before it is imported.
    """
    found: dict[str, Launch] = {}
    of = (layers.norms, layers.residuals, layers.attentions, layers.relus, layers.pools)
    runs = (_norm, _residual, _attention, _relu, _pool)
    for operator, calls, run in zip(OPERATORS, of, runs, strict=True):
        module = importlib.import_module(f"gdd_fast.kernels.{operator}")
        for layout, dtype, call, batch in itertools.product(LAYOUTS, DTYPES, calls, BATCHES):
            with recording(module, architecture) as cases:
                run(module, call, batch, Maps(dtype, layout))
            where = "" if layout is torch.channels_last else " contiguous"
            for case in cases:
                launch = Launch(operator, case, f"{call} {str(dtype)[6:]}{where} batch {batch}", (architecture,))
                found.setdefault(launch.key, launch)
    return found


@dataclass(frozen=True)
class Maps:
    """What the maps of a call are made of."""

    dtype: torch.dtype
    layout: torch.memory_format

    def __call__(self, n: int, c: int, size: int) -> Tensor:
        return torch.empty((n, c, size, size), dtype=self.dtype, device="meta", memory_format=self.layout)


def _norm(module: ModuleType, call: NormCall, batch: int, maps: Maps) -> None:
    """Forward with the statistics of none, one or both maps at hand, and backward with every gradient."""
    x, skip, *_ = *(maps(batch, c, call.resolution) for c in call.channels), None
    c = sum(call.channels)
    y = maps(batch, c, call.resolution)
    weight, bias = _rows(2, c)
    add = _rows(batch, c) if call.add else None
    scale, shift = _rows(batch, 2 * c).chunk(2, 1) if call.scale else (None, None)
    parts = statistics_parts(call.resolution**2)
    known = [_statistics(batch, t, parts) for t in (x, skip)]
    for given in ((None, None), (known[0], None), known):
        mean, rstd = module.forward(
            x, skip, call.num_groups, weight, bias, 1e-6, add, scale, shift, *given, call.silu, y, parts
        )
    dadd, *rows = (None if row is None else _rows(batch, c) for row in (add, weight, bias, scale, shift))
    # where a convolution's bias alone is added, that may be frozen
    for wanted in (dadd, None) if call.add and call.scale else (dadd,):
        module.backward(y, x, skip, weight, bias, add, scale, shift, mean, rstd, call.silu, x, skip, wanted, *rows)


def _residual(module: ModuleType, call: Any, batch: int, maps: Maps) -> None:
    h = maps(batch, call.channels, call.resolution)
    for bias in (None, _rows(1, call.channels)[0]):
        for statistics in (None, _statistics(batch, h, statistics_parts(call.resolution**2))):
            module.residual(h, h, bias, math.sqrt(0.5), h, statistics)


def _attention(module: ModuleType, call: AttentionCall, batch: int, maps: Maps) -> None:
    qkv = dataclasses.replace(maps, layout=torch.channels_last)(batch, 3 * call.channels, call.resolution)
    y, lse = module.attention(qkv, call.heads, False)
    module.attention_backward(y, qkv, y, lse, call.heads, False)


def _relu(module: ModuleType, call: ReluCall, batch: int, maps: Maps) -> None:
    y = maps(batch, call.channels, call.resolution)
    bias = torch.empty(call.channels, dtype=maps.dtype, device="meta")
    module.clamp_(y, call.ceiling, bias)
    module.mask_bits(y, module.relu_bits_(y, call.ceiling, bias))


def _pool(module: ModuleType, call: Any, batch: int, maps: Maps) -> None:
    x = maps(batch, call.channels, call.resolution)
    y, places = module.max_pool2x2(x)
    module.max_pool2x2_backward(y, places, x, maps.layout is torch.channels_last)


def _rows(n: int, c: int) -> Tensor:
    return torch.empty((n, c), device="meta")


def _statistics(n: int, x: Tensor | None, parts: int) -> Tensor | None:
    return None if x is None else torch.empty((n, parts, 2, x.shape[1]), device="meta")
