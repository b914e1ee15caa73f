"""How an operator and its peers become a case: forward alone, or forward and backward.

What each operator is compared with is in operator_inputs.py, and at which shapes in operator_cases.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.counts.flops import count_flops
from benchmarks.harness.case import Bench, Case, UnavailableError
from benchmarks.harness.checks import FACTOR, Accuracy, tensors
from benchmarks.harness.timing import Call
from gdd_fast.backend import PREFERENCE, Operator, obstacle
from gdd_fast.errors import BackendError

Function = Callable[..., Any]


@dataclass
class Problem:
    """One operator on one set of inputs.

    `definition(**inputs)` is in plain PyTorch and takes any floating type; each peer takes the same inputs. `extra`
    peers need a package, and raise UnavailableError when they are asked for. `saved_bytes` is what
    backward moves of the forward pass at the least: None for all inputs read again, 0 for linear operators; a mask that
    forward writes and backward reads counts twice. `bounds` do less than the work of a forward pass, such as a copy of
    an input: what no implementation undercuts.
    """

    inputs: dict[str, Tensor | None]
    definition: Function
    peers: dict[str, Function]
    differentiable: tuple[str, ...] = ()
    saved_bytes: int | None = None
    extra: dict[str, Callable[[], Function]] = field(default_factory=dict)
    bounds: dict[str, Function] = field(default_factory=dict)


Build = Callable[[torch.device], Problem]


def fused_peers(operator: Operator, device: torch.device, call: Callable[..., Any]) -> dict[str, Function]:
    """`call(..., backend=b)` for every fused implementation of `operator` that is made for `device`.

    One that cannot run here, as the extension is not built, say, is there by name: see `split_missing`.
    """
    found: dict[str, Function] = {}
    for backend in sorted(operator.fused & set(PREFERENCE.get(device.type, ()))):  # no interpreter: that is no peer
        try:
            reason = obstacle(operator, backend, device.type)
        except BackendError as error:  # a stale extension: its peer says so in its row, and the others run
            found[f"gdd_fast:{backend}"] = partial(_refuse, error)
            continue
        found[f"gdd_fast:{backend}"] = partial(call, backend=backend) if reason is None else _missing(reason)
    return found


def _missing(reason: str) -> Function:
    def peer(*_args: Any, **_kwargs: Any) -> Any:
        raise UnavailableError(reason)

    peer.missing = reason
    return peer


def split_missing(peers: dict[str, Function]) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that can run, and of the others why they cannot."""
    missing = {name: peer.missing for name, peer in peers.items() if hasattr(peer, "missing")}
    return {name: peer for name, peer in peers.items() if name not in missing}, missing


def _refuse(error: BackendError, *_args: Any, **_kwargs: Any) -> Any:
    raise error


def nchw(function: Function) -> Function:
    """Marks a peer whose maps are contiguous (NCHW), by its own settings; they are converted before it is timed."""
    function.nchw = True
    return function


def operator_case(group: str, name: str, build: Build, *, backward: bool, compiled: bool = False) -> Case:
    """The case of a problem, forward alone or forward and backward; `compiled` has the peer compile and no other."""
    pass_name = "forward+backward" if backward else "forward"
    return Case(f"{group} {pass_name}", name, partial(_bench, build, backward=backward, compiled=compiled))


def _bench(build: Build, device: torch.device, *, backward: bool, compiled: bool) -> Bench:
    problem = build(device)
    names = problem.differentiable if backward else ()
    inputs = {k: _leaf(t, k in names) for k, t in problem.inputs.items()}
    with torch.no_grad():
        shapes = tensors(problem.definition(**inputs))
    cotangents = [torch.randn_like(y) for y in shapes] if backward else []
    double = {k: _leaf(_double(t), k in names) for k, t in problem.inputs.items()}
    truth = _run(problem.definition, double, names, [c.double() for c in cotangents])
    accuracy = Accuracy(truth, _run(problem.definition, inputs, names, cotangents))
    # the definition rounds once; plain PyTorch rounds after every step, so other peers are held against that
    loose = Accuracy(truth, _run(problem.peers["stock"], inputs, names, cotangents), 2 * FACTOR)
    del truth, double

    def prepared(function: Function) -> Call:
        own = inputs
        if getattr(function, "nchw", False):
            own = {k: _leaf(_contiguous(t), k in names) for k, t in inputs.items()}
        return partial(_run, function, own, names, cotangents)

    usable, missing = split_missing(problem.peers)
    peers = {name: partial(prepared, f) for name, f in usable.items()}
    bounds = {} if backward else problem.bounds
    if compiled:
        compiled_stock = partial(torch.compile, problem.peers["stock"], fullgraph=True, dynamic=False)
        peers, missing, problem.extra, bounds = {"compile": lambda: prepared(compiled_stock())}, {}, {}, {}
    peers |= {name: partial(prepared, f) for name, f in bounds.items()}
    peers |= {name: (lambda f=f: prepared(f())) for name, f in problem.extra.items()}
    floating = [t for t in problem.inputs.values() if t is not None]
    return Bench(
        peers,
        accuracy.check,
        bytes=_bytes(problem, floating, shapes, names),
        flops=count_flops(lambda: _on_meta(problem, names)) or None,
        precision=_precision(floating),
        headline="device",
        like=accuracy.outputs,
        checks={name: loose.check for name in peers if not name.startswith("gdd_fast")},
        missing=missing,
        bounds={name: _size(floating) + _size(tensors(_run(f, inputs, (), []))) for name, f in bounds.items()},
    )


def _run(function: Function, inputs: dict[str, Any], names: Sequence[str], cotangents: Sequence[Tensor]) -> Any:
    """Outputs, and if `names` is not empty the gradients of those inputs."""
    if not names:
        with torch.no_grad():
            return function(**inputs)
    outputs = tensors(function(**inputs))
    return [y.detach() for y in outputs], torch.autograd.grad(outputs, [inputs[n] for n in names], cotangents)


def _bytes(problem: Problem, inputs: list[Tensor], outputs: list[Tensor], names: Sequence[str]) -> int:
    """Each input read once and each output written once, per pass, and what backward needs of the forward pass."""
    forward = _size(inputs) + _size(outputs)
    if not names:
        return forward
    gradients = _size([problem.inputs[n] for n in names])
    saved = _size(inputs) if problem.saved_bytes is None else problem.saved_bytes
    return forward + _size(outputs) + gradients + saved


def _size(some: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in some)


def _on_meta(problem: Problem, names: Sequence[str]) -> None:
    inputs = {
        k: None if t is None else torch.empty_like(t, device="meta", requires_grad=k in names)
        for k, t in problem.inputs.items()
    }
    outputs = tensors(problem.definition(**inputs))
    if names:
        torch.autograd.grad(outputs, [inputs[n] for n in names], [torch.empty_like(y) for y in outputs])


def _leaf(t: Tensor | None, wants_gradient: bool) -> Tensor | None:
    return None if t is None else t.detach().requires_grad_(wants_gradient)


def _double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _precision(inputs: Sequence[Tensor]) -> str:
    return "bf16" if any(t.dtype == torch.bfloat16 for t in inputs) else "fp32"


def package(name: str) -> Any:
    """An optional package that has a peer; raises UnavailableError if it cannot be imported."""
    import importlib

    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch or CUDA: not usable here either
        raise UnavailableError(f"{name} cannot be imported: {error}") from error
