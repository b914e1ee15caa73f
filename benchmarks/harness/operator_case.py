"""How an operator and its peers become a case: forward alone, or forward and backward.

What each operator is compared with is in operator_inputs.py, and at which shapes in operator_cases.py.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.counts.step_kernels import count_kernels
from benchmarks.harness.case import Bench, Case, UnavailableError
from benchmarks.harness.checks import FACTOR, Accuracy, tensors
from benchmarks.harness.timing import Call
from gdd_fast.backend import PREFERENCE, Operator, obstacle
from gdd_fast.errors import BackendError

Function = Callable[..., Any]


@dataclass
class Problem:
    """One operator on one set of inputs, beside what a user would run instead.

    `ours(**inputs, backend=...)`, and `stock(**inputs)`, the best of plain PyTorch. `official` follows the settings of
    the public code, and gets its maps in NCHW memory; by default it is `stock`. `definition` is in plain PyTorch and
    takes any floating type; by default `stock` too. `extra` peers need a package, and raise UnavailableError when they
    are asked for. `saved_bytes` is what backward moves of the forward pass at the least: None for all inputs read
    again, 0 for linear operators; a mask that forward writes and backward reads counts twice. `undifferentiable` are
    peers that have no gradient: they run where none is wanted. `bounds` do less than the
    work of a forward pass, such as a copy of an input: what no implementation undercuts.
    """

    operator: Operator
    inputs: dict[str, Tensor | None]
    ours: Function
    stock: Function
    official: Function | None = None
    definition: Function | None = None
    differentiable: tuple[str, ...] = ()
    saved_bytes: int | None = None
    extra: dict[str, Callable[[], Function]] = field(default_factory=dict)
    undifferentiable: dict[str, Function] = field(default_factory=dict)
    bounds: dict[str, Function] = field(default_factory=dict)


Build = Callable[[torch.device], Problem]


def fused_peers(operator: Operator, device: torch.device, call: Function) -> tuple[dict[str, Function], dict[str, str]]:
    """`call(..., backend=b)` for every fused implementation of `operator` that is made for `device`.

    Those that cannot run here, as the extension is not built, say, come second, with the reason.
    """
    found: dict[str, Function] = {}
    missing: dict[str, str] = {}
    for backend in sorted(operator.fused & set(PREFERENCE.get(device.type, ()))):  # no interpreter: that is no peer
        name = f"gdd_fast:{backend}"
        try:
            reason = obstacle(operator, backend, device.type)
        except BackendError as error:  # a stale extension: its peer says so in its row, and the others run
            found[name] = partial(_refuse, error)
            continue
        if reason is None:
            found[name] = partial(call, backend=backend)
        else:
            missing[name] = reason
    return found, missing


def _refuse(error: BackendError, *_args: Any, **_kwargs: Any) -> Any:
    raise error


def operator_case(group: str, name: str, build: Build, *, backward: bool, compiled: bool = False) -> Case:
    """The case of a problem, forward alone or forward and backward; `compiled` has the peer compile and no other."""
    pass_name = "forward+backward" if backward else "forward"
    return Case(f"{group} {pass_name}", name, partial(_bench, build, backward=backward, compiled=compiled))


def _bench(build: Build, device: torch.device, *, backward: bool, compiled: bool) -> Bench:
    problem = build(device)
    stock = problem.stock
    definition = problem.definition or stock
    names = problem.differentiable if backward else ()
    given = [t for t in problem.inputs.values() if t is not None]

    def changed(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        """The inputs anew; those of `names` want their gradients."""
        return {
            k: None if t is None else change(t).detach().requires_grad_(k in names) for k, t in problem.inputs.items()
        }

    inputs, meta = changed(lambda t: t), changed(lambda t: torch.empty_like(t, device="meta"))
    shapes = tensors(_run(definition, inputs, (), []))
    cotangents = [torch.randn_like(y) for y in shapes] if backward else []
    double = changed(lambda t: t.double() if t.is_floating_point() else t)
    truth = _run(definition, double, names, [c.double() for c in cotangents])
    accuracy = Accuracy(truth, _run(definition, inputs, names, cotangents))
    # the definition rounds once; plain PyTorch rounds after every step, so other peers are held against that
    loose = Accuracy(truth, _run(stock, inputs, names, cotangents), 2 * FACTOR)
    del truth, double

    def peer(function: Function, own: dict[str, Tensor | None] = inputs) -> Call:
        return partial(_run, function, own, names, cotangents)

    bounds = {} if backward or compiled else problem.bounds
    if compiled:
        whole = inspect.unwrap(stock)  # without switches that a compiler does not trace
        peers = {"compile": lambda: peer(torch.compile(whole, fullgraph=True, dynamic=False))}
        missing: dict[str, str] = {}
    else:
        fused, missing = fused_peers(problem.operator, device, problem.ours)
        peers = {"official": lambda: peer(problem.official or stock, changed(torch.Tensor.contiguous))}
        forward = {} if backward else problem.undifferentiable
        peers |= {name: partial(peer, f) for name, f in ({"stock": stock} | fused | forward | bounds).items()}
        peers |= {name: (lambda make=make: peer(make())) for name, make in problem.extra.items()}
    meta_cotangents = [torch.empty_like(c, device="meta") for c in cotangents]
    flops = count_kernels(lambda: _run(definition, meta, names, meta_cotangents)).flop
    return Bench(
        peers,
        accuracy.check,
        bytes=_bytes(problem, given, shapes, names),
        flops=flops or None,
        precision="bf16" if any(t.dtype == torch.bfloat16 for t in given) else "fp32",
        headline="device",
        like=accuracy.outputs,
        checks={name: loose.check for name in peers if not name.startswith("gdd_fast")},
        missing=missing,
        bounds={name: _size(given) + _size(tensors(_run(f, inputs, (), []))) for name, f in bounds.items()},
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


def package(name: str) -> Any:
    """An optional package that has a peer; raises UnavailableError if it cannot be imported."""
    if torch.version.cuda is None:
        _declare_vision()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch or CUDA: not usable here either
        raise UnavailableError(f"{name} cannot be imported: {error}") from error


@functools.cache
def _declare_vision() -> torch.library.Library:
    """torchvision from PyPI, which timm, diffusers and others import, asks a CPU build of PyTorch for two operators
    that it has not and that no network here uses. They last as long as what is returned."""
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
