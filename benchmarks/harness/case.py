"""A case: one piece of work, the peers that can do it, and the one way a case becomes rows of the record.

`measure_case` is used by pytest and by the battery alike: build, run each peer on poisoned memory, compare, time,
compare the last round again. What goes wrong with one peer becomes a row with a `failure` and no time.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.harness.checks import MismatchError, poisoned, spoil, tensors
from benchmarks.harness.results import Row
from benchmarks.harness.timing import Call, measure, peak_bytes

OUT_OF_MEMORY = "out of memory"
NO_TIME = "no time left"
CANNOT_RUN = "cannot run here: "
COMPILED = ("compile", "max-autotune")
"""Peers that go through torch.compile."""

EXPORTED = ("onnxruntime", "openvino")
"""Peers that run an exported file, which takes tens of seconds to write."""

GRAPHS = ("graph", "max-autotune")
"""Peers that replay a CUDA graph: its memory is allocated at capture, so a count around a call sees none of it."""


class UnavailableError(Exception):
    """A peer that cannot run here: a package or a device that is not there."""


@dataclass
class Bench:
    """A case that is built: inputs on the device, and for each peer a function that prepares its call.

    `check(outputs)` raises MismatchError; a peer named in `checks` computes in another type by its own settings and is
    checked by that function instead. The numbers are of one call, as in `Row`.
    """

    peers: dict[str, Callable[[], Call]]
    check: Callable[[Any], None]
    bytes: int | None = None
    flops: int | None = None
    images: int | None = None
    precision: str = "fp32"
    precisions: dict[str, str] = field(default_factory=dict)
    """The types of peers that compute in another one than the rest."""
    headline: str = "wall"
    counts_memory: bool = True
    """Whether the peak of this process's tensors says anything; not where the work is done elsewhere."""
    like: list[torch.Tensor] = field(default_factory=list)
    """Tensors of the outputs' sizes, to poison the memory that they will get."""
    checks: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    """Peers that do less than the work, such as a copy of the input, by the bytes they move: compared with nothing."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peers of ours that belong here and cannot run, and why."""
    keep: Any = None
    """What has to live as long as the case, such as a temporary folder."""


@dataclass(frozen=True)
class Case:
    """`build(device)` makes the Bench; nothing is allocated before."""

    group: str
    name: str
    build: Callable[[torch.device], Bench]
    larger: bool = False
    """The same as another case but for its size: left out where nothing is timed."""

    def __str__(self) -> str:
        return f"{self.group}-{self.name}".replace(" ", "-")


@dataclass(frozen=True)
class Effort:
    """How long a peer is timed. `seconds` 0 checks and takes no time; what takes minutes to compile is left out."""

    seconds: float = 0.5
    least: int = 5
    most: int = 200


def measure_peer(
    case: Case, bench: Bench, peer: str, device: torch.device, effort: Effort, timer: Callable[..., Any] = measure
) -> Row | None:
    """One row: with a failure in it if that is what happened, without times if none were to be taken.

    None if the peer cannot run here. `timer` is `timing.measure` or stands in for it.
    """
    compiled = any(name in peer for name in COMPILED)
    if not effort.seconds and (compiled or any(name in peer for name in EXPORTED)):
        return None
    row = Row(case.group, case.name, peer)
    try:
        call = bench.peers[peer]()
        spoil(call)
        with poisoned(device, bench.like):
            outputs = call()
        _check(bench, peer, outputs)
        if not effort.seconds:
            return row
        del outputs
        timing, outputs = timer(call, device, seconds=effort.seconds, least=effort.least, most=effort.most)
        if spoil(call):
            outputs = call()
        _check(bench, peer, outputs)
        del outputs
        visible = bench.counts_memory and not any(name in peer for name in GRAPHS)
        return replace(
            row,
            **vars(timing),
            headline=bench.headline,
            bytes=bench.bounds.get(peer, bench.bytes),
            flops=None if peer in bench.bounds else bench.flops,
            precision=bench.precisions.get(peer, bench.precision),
            images=bench.images,
            peak_bytes=peak_bytes(call, device) if visible else None,
        )
    except UnavailableError:
        return None
    except torch.OutOfMemoryError:
        return replace(row, failure=OUT_OF_MEMORY)
    except MismatchError as error:
        return replace(row, failure=f"wrong: {error}")
    except Exception as error:  # a peer's own fault, whatever it is, ends that peer and is kept
        return replace(row, failure=describe_error(error))
    finally:
        call = None  # what it holds can be given back
        if compiled or bench.headline == "wall":  # an operator's inputs are freed as soon as its call is
            release(device, compiled=compiled)


def _check(bench: Bench, peer: str, outputs: Any) -> None:
    for tensor in tensors(outputs):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MismatchError("an output holds NaN or infinity: memory that is read or left unwritten")
    if peer not in bench.bounds:
        bench.checks.get(peer, bench.check)(outputs)


def measure_case(
    case: Case, device: torch.device, effort: Effort, stop: Callable[[], bool] = lambda: False
) -> Iterator[Row]:
    """The rows of all peers, one after the other; a case that cannot be built gives one row that says so.

    Once `stop()` is true no further peer is started, and the first of those has a row that says NO_TIME. Where nothing
    is timed, peers of ours that cannot run have rows that begin with CANNOT_RUN.
    """
    try:
        bench = case.build(device)
    except UnavailableError:
        return
    except Exception as error:  # as above
        release(device)
        failure = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else describe_error(error)
        yield Row(case.group, case.name, "-", failure=failure)
        return
    for peer, reason in bench.missing.items() if not effort.seconds else ():
        yield Row(case.group, case.name, peer, failure=CANNOT_RUN + reason)
    for peer in bench.peers:
        if stop():
            yield Row(case.group, case.name, peer, failure=NO_TIME)
            return
        row = measure_peer(case, bench, peer, device, effort)
        if row is not None:
            yield row


def describe_error(error: BaseException) -> str:
    """One line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def computes(device: torch.device) -> bool:
    """Whether the device still does: after a fault in a kernel, nothing runs on it in this process."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


def release(device: torch.device, *, compiled: bool = False) -> None:
    """Give the device back what the last peer took, compiled code and captured graphs too."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
