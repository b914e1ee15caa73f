"""group_norm_silu as an operator of PyTorch: derivatives, registration, compilation, backends; what it refuses."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gdd_fast.backend import has_extension
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops.group_norm_silu import OPERATOR, definition, fused, group_norm_silu
from norm_case import BACKENDS, LAYOUTS, Case
from parity import backends, device_for


@BACKENDS
def test_repeats_to_the_bit(backend):
    case = Case((1, 16, 8, 8), 4, backend=backend)

    def run():
        y = case.fused(*case.inputs)
        return (y, *torch.autograd.grad(y.square().sum(), case.inputs))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@BACKENDS
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (4,), (5,), (6,)], ids=str)
def test_only_the_gradients_that_are_needed(wanted, backend):
    case = Case((2, 4, 3, 3), 2, pair=2, rows=("add", "scale", "shift"), backend=backend, requires_grad=False)
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(case.inputs)]
    y = case.fused(*inputs)
    got = torch.autograd.grad(y.square().sum(), [inputs[i] for i in wanted])
    # all of them, then chosen: eager torch itself crashes on channels_last memory if x's is not asked for
    inputs = [t.detach().requires_grad_() for t in inputs]
    every = torch.autograd.grad(case.ref(*inputs).square().sum(), inputs)
    want = [every[i] for i in wanted]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [{}, {"pair": 3, "rows": ("add",)}, {"activation": None, "one_row": True}], ids=str)
def test_gradients_once_and_twice(form):
    case = Case((2, 3, 2, 3), 3, dtype=torch.float64, **form)
    assert torch.autograd.gradcheck(case.fused, case.inputs)
    assert torch.autograd.gradgradcheck(case.fused, case.inputs)


@BACKENDS
def test_second_derivative_of_a_fused_forward(backend):
    """R1: the gradient of a function of the input's gradient; one input also depends on another."""
    case = Case((2, 4, 3, 3), 2, rows=("add",), backend=backend)

    def penalty(function):
        x, weight, bias, add = case.inputs
        y = function(x, weight, bias, add + x.mean((2, 3)))
        (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), case.inputs)

    for got, want in zip(penalty(case.fused), penalty(case.ref), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_registration(backend):
    case = Case((2, 4, 3, 3), 2, pair=2, backend=backend)
    x, skip, weight, bias, add, scale, shift = case.inputs
    op = torch.ops.gdd_fast.group_norm_silu.default
    arguments = (x, skip, 2, weight, bias, 1e-5, add, scale, shift, True, None, None, backend)
    opcheck(op, arguments)
    rows_apart = torch.zeros(2, 4, 3, 6, device=x.device).contiguous(memory_format=torch.channels_last)[..., :3]
    opcheck(op, (rows_apart, *arguments[1:]), test_utils=("test_schema", "test_faketensor"))
    _, mean, rstd = op(*(t.detach() if isinstance(t, Tensor) else t for t in arguments))
    dy, inputs = torch.ones(2, 6, 3, 3, device=x.device), arguments[:10]
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
    for needed in ([True] * 7, [False, True, False, True, True, False, False]):
        opcheck(
            torch.ops.gdd_fast.group_norm_silu_backward.default,
            (dy, *inputs, mean, rstd, needed, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@BACKENDS
def test_compiles_without_graph_breaks(backend):
    case = Case((2, 4, 3, 3), 2, rows=("add",), backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: case.fused(*t) * 2, fullgraph=True, backend="aot_eager")
    y, want = compiled(*case.inputs), case.ref(*case.inputs) * 2
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y.square().sum(), case.inputs)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), case.inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_extension(), reason="the extension gdd_fast._C is not built")
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 32, 16, 16), (3, 64, 64, 32)], ids=str)
def test_auto_on_a_cpu_is_the_extension_at_every_size(shape, dtype, layout, monkeypatch):
    """With SiLU it was measured to be no slower than plain PyTorch at any; see docs/cpu_operators.md."""
    case = Case(shape, 2, dtype=dtype, layout=layout, backend="cpp", requires_grad=False)
    want, cpp = case.ref(*case.inputs), case.fused(*case.inputs)
    for module, name in ((definition, "formula"), (definition, "forward"), (fused, "forward_cpp")):
        monkeypatch.setattr(module, name, None)
    auto = case.call(group_norm_silu, *case.inputs)
    assert torch.equal(auto, cpp) and auto.stride() == cpp.stride()
    torch.testing.assert_close(auto, want, rtol=0.02, atol=0.02)


STOCK = """
import pytest, torch
from torch.nn.functional import group_norm
from gdd_fast.errors import InputError
from gdd_fast.ops.group_norm_silu import group_norm_silu
avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
weight, bias = torch.randn(2, 256)
for dtype, stock in ((torch.float32, True), (torch.bfloat16, avx2), (torch.float16, False)):
    x = torch.randn(4, 256, 32, 32).to(dtype, memory_format=torch.channels_last)
    want = group_norm(x, 32, weight, bias)
    def same(x=x, **options):
        y = group_norm_silu(x, 32, weight, bias, **{"activation": None} | options)
        assert y.stride() == x.stride() and y.dtype == x.dtype
        torch.testing.assert_close(y, want[: len(x)], rtol=0.02, atol=0.02)
        return torch.equal(y, want[: len(x)])
    with torch.no_grad():
        assert same() == stock and not same(backend="cpp") and not same(x[:1])
        with pytest.raises(InputError):
            group_norm_silu(x, 7, weight, bias, activation=None)
    assert not same()
"""


@pytest.mark.skipif(not has_extension(), reason="the extension gdd_fast._C is not built")
@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_large_maps_with_nothing_around_them_are_pytorch_s(instructions):
    """Where that was measured to be faster; see docs/cpu_operators.md."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    subprocess.run([sys.executable, "-c", STOCK], env=environment, check=True)


OTHER_SETS = """
import torch
from gdd_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_ref
weight, bias = torch.randn(2, 44)
for dtype, eps in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
    for layout in (torch.channels_last, torch.contiguous_format):
        x = (20 * torch.randn(2, 44, 9, 31) + 100).to(dtype).contiguous(memory_format=layout)
        got = group_norm_silu(x, 4, 30 * weight, bias, backend="cpp")
        want = group_norm_silu_ref(x.double(), 4, 30 * weight.double(), bias.double())
        assert ((got - want).abs() <= eps * want.abs() + 2e-5).all(), (dtype, layout, (got - want).abs().max())
"""


@pytest.mark.skipif(not has_extension(), reason="the extension gdd_fast._C is not built")
@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_with_the_instructions_of_other_processors(instructions):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    subprocess.run([sys.executable, "-c", OTHER_SETS], env=environment, check=True)


def test_autocast_does_not_change_the_dtype():
    case = Case((2, 4, 3, 3), 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.fused(*case.inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"\(N, C, H, W\), not of shape \(2, 4, 3\)"),
        ({"x": torch.zeros(2, 4, 3, 3).int()}, "int32"),
        ({"x": torch.zeros(2, 4, 0, 3)}, "no pixels"),
        ({"num_groups": 3}, "4 channels do not divide into 3 groups"),
        ({"num_groups": 0}, "into 0 groups"),
        ({"weight": torch.zeros(5)}, r"weight must be \(4,\)"),
        ({"bias": torch.zeros(4).int()}, "bias must be floating"),
        ({"add": torch.zeros(3, 4)}, r"add must be \(2, 4\) or \(1, 4\)"),
        ({"scale": torch.zeros(4)}, "scale must be"),
        ({"activation": "relu"}, "activation"),
        ({"x": (torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 4, 4))}, "second tensor of a pair"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta"),
        ({"shift": torch.zeros(2, 4, device="meta")}, "shift is on meta"),
        ({"statistics": torch.zeros(2, 1, 2, 4, device="meta")}, "statistics is on meta"),
        ({"statistics": torch.zeros(2, 1, 2, 5)}, "statistics must be"),
        ({"statistics": torch.zeros(2, 1, 2, 4).half()}, "statistics must be torch.float32"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 4, 3, 3), "num_groups": 2, "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(InputError, match=message):
        group_norm_silu(**arguments | change)


def test_backend_by_name_is_obeyed_or_refused():
    x, weight = torch.zeros(1, 4, 2, 2, dtype=torch.float64), torch.ones(4)
    with pytest.raises(BackendError, match="no cuda implementation"):
        group_norm_silu(x, 2, weight, weight, backend="cuda")
    if not backends(OPERATOR)[-1].marks:
        x, weight = (t.to(device_for("triton")) for t in (x, weight))
        with pytest.raises(BackendError, match="float64"):
            group_norm_silu(x, 2, weight, weight, backend="triton")


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("value", [-float("inf"), float("inf"), float("nan"), -1e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_so_in_every_gradient_as_in_pytorch(dtype, value, layout, backend):
    case = Case((1, 32, 3, 3), 2, dtype=dtype, layout=layout, rows=("shift",), backend=backend)
    with torch.no_grad():
        case.inputs[-1][0, 17] = value

    def kinds(function):
        y = function(*case.inputs)
        every = (y, *torch.autograd.grad(y.float().sum(), case.inputs))
        return [(t.isnan(), t.isposinf(), t.isneginf()) for t in every]

    for got, want in zip(kinds(case.fused), kinds(case.ref), strict=True):
        assert all(map(torch.equal, got, want))


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_ends_of_the_type_silu_is_zero_and_the_identity(dtype, layout, backend):
    case = Case((1, 32, 3, 3), 2, dtype=dtype, layout=layout, rows=("shift",), backend=backend)
    with torch.no_grad():
        case.inputs[-1][0, :2] = torch.tensor([-1e38, 1e38])
    y = case.fused(*case.inputs)
    (shift,) = torch.autograd.grad(y, case.inputs[-1:], torch.ones_like(y))
    assert bool((y[:, 0] == 0).all())
    torch.testing.assert_close(y[:, 1], case.inputs[-1][:, 1, None, None].expand(1, 3, 3))
    assert shift[0, :2].tolist() == [0, 9]  # pixels
