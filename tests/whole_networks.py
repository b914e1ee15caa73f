"""The comparison rule of parity.py for whole networks, and what every accelerated network has to keep."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gdd_fast import accelerate, restore
from gdd_fast.acceleration import Report

Run = Callable[[nn.Module, torch.dtype], dict[str, Tensor]]


def results(net: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype) -> dict:
    """The output, and the gradients of the inputs and parameters that require one, by name."""
    inputs = tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)
    y = call(net, *inputs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    leaves = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    leaves |= {name: p for name, p in net.named_parameters() if p.requires_grad}
    got = {"output": y.detach()}
    if leaves:
        gradients = torch.autograd.grad(y, leaves.values(), cotangent.to(y.dtype), allow_unused=True)
        got |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return got


def assert_accelerates(
    net: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, backend: str = "auto"
) -> Report:
    """`net` accelerated is as accurate as it was: of every result, and of all gradients of parameters together, the
    relative error in the 2-norm against float64 is at most twice the original's (and where that is next to nothing, a
    few roundings). Afterwards `net` is accelerated."""
    dtype = next(net.parameters()).dtype
    want = results(copy.deepcopy(net).double(), call, inputs, torch.float64)
    eager = results(net, call, inputs, dtype)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    same, report = accelerate(net, backend=backend, report=True)
    assert same is net and report.replaced
    got = results(net, call, inputs, dtype)
    assert got.keys() == eager.keys()
    parameters = sorted(dict(net.named_parameters()).keys() & got.keys())
    for names in [parameters, *([name] for name in got if name not in parameters)]:
        error, eager_error = (_error(result, want, names) for result in (got, eager))
        floor = 8 * torch.finfo(dtype).eps * len(names) ** 0.5
        assert error <= 2 * eager_error + floor, f"{names}: error {error:.2e}, and eager torch's is {eager_error:.2e}"
    after = net.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    return report


def _error(got: dict[str, Tensor], want: dict[str, Tensor], names: list[str]) -> float:
    relative = [(got[name].double() - want[name]).norm() / want[name].norm().clamp_min(1e-12) for name in names]
    return torch.tensor(relative).norm().item()


def assert_restores(net: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """`restore` gives an accelerated net the original's classes and outputs back, bit for bit."""
    restore(net)
    assert all(type(module).__mro__[1:] and "_gdd_fast" not in module.__dict__ for module in net.modules())
    before = call(net, *inputs)
    accelerate(net)
    restore(net)
    assert torch.equal(call(net, *inputs), before)
