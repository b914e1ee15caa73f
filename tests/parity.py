"""The one comparison rule for fused operators, and where each backend can be tested.

A fused implementation passes if its error is at most twice that of eager PyTorch in the same dtype, both measured
against the definition in float64: for every output and for the gradient of every input that requires one.
"""

import mmap
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gdd_fast.backend import Operator, obstacle

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def device_for(backend: str) -> str:
    """Where the tests of `backend` put their tensors: Triton goes to the CPU's interpreter if there is no GPU."""
    return "cuda" if backend == "cuda" or (backend != "cpp" and torch.cuda.is_available()) else "cpu"


def backends(operator: Operator) -> list:
    """pytest parameters: every implementation of `operator`, those that cannot run here skipped with the reason."""
    parameters = []
    for backend in ("torch", *sorted(operator.fused)):
        device = device_for(backend)
        reason = obstacle(operator, backend, device)
        if reason is None and device == "cuda" and not torch.cuda.is_available():
            reason = "no GPU"
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{backend}: {reason}")]
        parameters.append(pytest.param(backend, marks=marks))
    return parameters


def promised(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of a CPU that is not there until it is written to; PyTorch's own may be filled where it is allocated."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=private), dtype=dtype)


def assert_as_accurate_as_torch(
    fused: Function, ref: Function, inputs: Sequence[Tensor], *, factor: float = 2.0, seed: int = 0
) -> None:
    """Assert the rule for `fused(*inputs)` against `ref(*inputs)`.

    Gradients are compared for the inputs that require them, for random cotangents that are slices of a larger tensor,
    as the gradients of a U-Net's skip connections are. Where eager torch happens to be exact, two units in the
    last place of the largest value are allowed.
    """
    want = _run(ref, inputs, seed, torch.float64)
    eager = _run(ref, inputs, seed)
    got = _run(fused, inputs, seed)
    assert got.keys() == eager.keys(), f"{list(got)} instead of {list(eager)}"
    for name, tensor in got.items():
        reference = eager[name]
        assert (tensor.shape, tensor.dtype) == (reference.shape, reference.dtype), (
            f"{name}: {tensor.dtype} {tuple(tensor.shape)} instead of {reference.dtype} {tuple(reference.shape)}"
        )
        assert tensor.isfinite().all() or not want[name].isfinite().all(), f"{name}: not finite"
        error, eager_error = (_max_error(t, want[name]) for t in (tensor, reference))
        floor = 2 * torch.finfo(tensor.dtype).eps * want[name].abs().max().item() if tensor.numel() else 0.0
        assert error <= factor * eager_error + floor, (
            f"{name}: error {error:.3e}, and eager torch's is {eager_error:.3e} (floor {floor:.1e})"
        )


def _max_error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item() if got.numel() else 0.0


def _run(
    function: Function, inputs: Sequence[Tensor], seed: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs by "output 0", gradients by "gradient of input 1"; floating inputs converted to `dtype` if given."""
    arguments = [_leaf(t, dtype) for t in inputs]
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    differentiable = [(i, t) for i, t in enumerate(arguments) if t.requires_grad]
    if differentiable:
        lowest = next(t.dtype for t in inputs if t.requires_grad)
        cotangents = [_cotangent(y, seed + i, lowest) for i, y in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, [t for _, t in differentiable], cotangents)
        results |= {f"gradient of input {i}": g for (i, _), g in zip(differentiable, gradients, strict=True)}
    return results


def _leaf(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    converted = t.detach().to(dtype) if dtype is not None and t.is_floating_point() else t.detach()
    return converted.requires_grad_(t.requires_grad)


def _cotangent(y: Tensor, seed: int, rounded_to: torch.dtype) -> Tensor:
    """The same numbers whatever y's dtype, with a stranger's numbers between those of one sample and the next."""
    generator = torch.Generator().manual_seed(seed)
    stranger, own = torch.randn((2, *y.shape), generator=generator, dtype=torch.float64).to(rounded_to).to(y.dtype)
    dim = min(1, y.dim())
    return torch.stack([stranger, own], dim).to(y.device).select(dim, 1)
