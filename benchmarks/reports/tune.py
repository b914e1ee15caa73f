"""Candidates for kernels/tuned.json: each Triton kernel's launch options, tried on layers of the real networks.

For every entry of the table the defaults are varied one grid at a time, and the setting with the smallest geometric
mean over the layers wins. Nothing is written to the table: winners and times go to the notes of the results file, as
the entry that a person would add ("sm_90": {...}).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import operator_inputs
from benchmarks.cases.layer_calls import ConvCall, layers
from benchmarks.harness.case import Bench, Case, computes, describe_error
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.operator_case import operator_case
from benchmarks.harness.results import Results
from benchmarks.harness.timing import measure
from gdd_fast.ops.relu_bits import CEILING

Options = dict[str, int]

operators = torch.ops.gdd_fast

_FACTORS = (0.5, 1, 2, 4)
_WARPS = (2, 4, 8, 16)
_SECONDS = 0.05


def grid(default: Options) -> list[Options]:
    """The default first, then its size times each factor with each number of warps."""
    size = next(name for name in ("elements", "BLOCK") if name in default)
    found = [dict(default)]
    for factor, warps in itertools.product(_FACTORS, _WARPS):
        options = {**default, size: int(default[size] * factor), "num_warps": warps}
        if options not in found:
            found.append(options)
    return found


@contextlib.contextmanager
def using(entry: str, architecture: str, options: Options) -> Iterator[None]:
    """`entry` of the table of launch options overridden for `architecture`, put back afterwards."""
    from gdd_fast.kernels import _launch

    _launch.configuration.cache_clear()
    try:
        with mock.patch.dict(_launch.table()[entry], {architecture: options}):
            yield
    finally:
        _launch.configuration.cache_clear()


def entries(smoke: bool) -> dict[str, list[Case]]:
    """The entries that can be tuned, with the cases each is judged by: three layers, small to large."""
    batch, dtype = (1, torch.float32) if smoke else (64, torch.bfloat16)
    found = layers()

    def some(calls: Sequence[Any]) -> list[Any]:
        return list(dict.fromkeys([calls[0], calls[len(calls) // 2], calls[-1]]))[: 1 if smoke else 3]

    def cases(group: str, calls: Sequence[Any], problem: Callable[..., Any], backward: bool) -> list[Case]:
        return [
            operator_case(group, str(call), partial(problem, call, batch, dtype), backward=backward)
            for call in some(calls)
        ]

    return {
        "group_norm_silu.forward": cases("group_norm_silu", found.norms, operator_inputs.norm_problem, False),
        "group_norm_silu.backward": cases("group_norm_silu", found.norms, operator_inputs.norm_problem, True),
        "residual": cases("residual", found.residuals, operator_inputs.residual_problem, False),
        "relu_bits": [
            Case("relu_bits", str(call), partial(_bits, call, batch, dtype)) for call in some(found.convolutions)
        ],
        "max_pool2x2": cases("max_pool2x2", found.pools, operator_inputs.pool_problem, True),
    }


def _bits(layer: ConvCall, batch: int, dtype: torch.dtype, device: torch.device) -> Bench:
    """What the kernels of relu_bits do, for one output and its gradient: the convolution, which is the
    library's and takes most of the time, is left out.
    """
    shape, ceiling = (batch, layer.size[0], layer.output_side, layer.output_side), CEILING[layer.activation]
    start, dy = (4 * torch.randn(shape, device=device) for _ in range(2))
    start, dy = (t.to(dtype, memory_format=torch.channels_last) for t in (start, dy))
    y = start.clone()
    expected = [start.clamp(0, ceiling), dy * ((start > 0) & (start < ceiling))]

    def call() -> list[torch.Tensor]:
        bits = operators.relu_bits_(y, ceiling, "triton")  # a clamped y stays, and its bits do
        return [y, operators.mask_bits(dy, bits, "triton")]

    def check(outputs: list[torch.Tensor]) -> None:
        right = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        y.copy_(start)
        if not right:
            raise MismatchError("what is clamped, or what the bits mask, is not the definition's")

    return Bench({"gdd_fast:triton": lambda: call}, check)


def tune(results: Results, path: Path, device: torch.device, left: Callable[[], float], *, smoke: bool = False) -> bool:
    """Try every entry that the file does not have while `left()` is positive; saves after each.

    What is wrong or fails is no candidate. False if the device was lost on the way: another process may go on.
    """
    from gdd_fast.kernels import _launch

    notes = results.notes.setdefault("tuning", {})
    if device.type != "cuda":
        notes["skipped"] = f"the Triton kernels do not run on {device.type} at full speed"
        results.save(path)
        return True
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"sm_{major}{minor}"
    for entry, cases in entries(smoke).items():
        if entry in notes:
            continue
        if entry not in _launch.table() or left() <= 0:
            notes[entry] = {"not tried": "no such entry" if left() > 0 else "no time left"}
            continue
        notes[entry] = {"failed": "the process ended"}  # stands unless the next line returns
        results.save(path)
        try:
            notes[entry] = tune_entry(entry, cases, architecture, device, left)
        except Exception as error:  # the other entries are still worth their time
            notes[entry] = {"failed": describe_error(error)}
        results.save(path)
        if not computes(device):
            return False
    results.save(path)
    return True


def tune_entry(
    entry: str, cases: list[Case], architecture: str, device: torch.device, left: Callable[[], float]
) -> dict[str, Any]:
    """Geometric mean of the times by setting, and the best as an entry of the table."""
    from gdd_fast.kernels import _launch

    benches = [case.build(device) for case in cases]
    tried: list[dict[str, Any]] = []
    for options in grid(_launch.table()[entry]["default"]):
        if left() <= 0:
            break
        try:
            with using(entry, architecture, options):
                tried.append({"options": options, "seconds": geometric_mean(_time(bench, device) for bench in benches)})
        except Exception as error:  # wrong, or out of registers or shared memory, say: no setting for this GPU
            failed = str(error) if isinstance(error, MismatchError) else describe_error(error)
            tried.append({"options": options, "failed": failed})
            if not computes(device):
                break
    timed = [one for one in tried if "seconds" in one]
    if not timed:
        return {"tried": tried}
    best = min(timed, key=lambda one: one["seconds"])
    default = tried[0].get("seconds")
    return {
        "candidate": {architecture: best["options"]},
        "gain": None if default is None else default / best["seconds"],
        "complete": left() > 0,
        "tried": tried,
    }


def _time(bench: Any, device: torch.device) -> float:
    """Device seconds of the Triton peer, compared before and after."""
    call = bench.peers["gdd_fast:triton"]()
    bench.check(call())
    timing, outputs = measure(call, device, seconds=_SECONDS, least=5)
    bench.check(outputs)
    return (timing.device or timing.wall)[1]
