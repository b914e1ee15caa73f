"""group_norm_silu: as accurate as eager torch in every form, layout and dtype; what it saves, returns and refuses."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from benchmarks.shapes import norm_calls
from gdd_fast.backend import has_extension
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops import _group_norm_fused as fused
from gdd_fast.ops._maps import memory_format
from gdd_fast.ops.group_norm_silu import OPERATOR, group_norm_silu, group_norm_silu_ref
from gdd_fast.ops.residual import residual
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
CALLS = norm_calls()


class Case:
    """Inputs for one call, and the call as a function of its tensors."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        *,
        pair: int = 0,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
        rows: tuple[str, ...] = ("add", "scale", "shift"),
        row_dtype: torch.dtype | None = None,
        one_row: bool = False,
        activation: str | None = "silu",
        backend: str = "torch",
        requires_grad: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        n, c, h, w = shape

        def normal(*size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return mean + std * torch.randn(size, generator=generator, dtype=torch.float64)

        device = device_for(backend)
        maps = [normal(n, width, h, w, mean=0.5) for width in (c, pair) if width]
        maps = [t.to(device, dtype).contiguous(memory_format=layout) for t in maps]
        c += pair
        parameters = [t.to(device, torch.promote_types(dtype, torch.float32)) for t in (normal(c, mean=1), normal(c))]
        given = [normal(1 if one_row else n, c, std=0.5).to(device, row_dtype or dtype) for _ in rows]
        self.inputs = [t.requires_grad_(requires_grad) for t in (*maps, *parameters, *given)]
        self.groups, self.pair, self.rows, self.activation, self.backend = groups, pair, rows, activation, backend

    def call(self, function, *tensors: Tensor, **options) -> Tensor:
        x, rest = (tensors[:2], tensors[2:]) if self.pair else (tensors[0], tensors[1:])
        given = dict(zip(self.rows, rest[2:], strict=True))
        return function(x, self.groups, *rest[:2], activation=self.activation, **given, **options)

    def fused(self, *tensors: Tensor, **options) -> Tensor:
        return self.call(group_norm_silu, *tensors, backend=self.backend, **options)

    def ref(self, *tensors: Tensor) -> Tensor:
        return self.call(group_norm_silu_ref, *tensors)

    def check(self) -> None:
        assert_as_accurate_as_torch(self.fused, self.ref, self.inputs)


FORMS = {
    "plain": {"rows": ()},
    "no activation": {"rows": (), "activation": None},
    "ncsn": {"rows": ("add",)},
    "adm": {"rows": ("scale", "shift")},
    "shift alone": {"rows": ("shift",), "activation": None},
    "everything": {},
    "one row": {"one_row": True},
    "pair": {"pair": 28},  # groups of 6 straddle the seam at 20
    "float32 rows": {"dtype": torch.bfloat16, "row_dtype": torch.float32},
}


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, backend):
    """Odd sizes: no tile is full, channel blocks neither."""
    channels, groups = (20, 8) if form == "pair" else (24, 4)
    Case((2, channels, 3, 5), groups, backend=backend, **FORMS[form]).check()


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_of_one_is_split_over_programs(dtype, layout, backend):
    Case((1, 12, 12, 12), 3, dtype=dtype, layout=layout, backend=backend).check()
    Case((1, 10, 9, 15), 4, pair=6, dtype=dtype, layout=layout, backend=backend, rows=("add",)).check()


@BACKENDS
@LAYOUTS
def test_many_samples_take_one_kernel(layout, backend):
    Case((9, 8, 3, 3), 2, layout=layout, backend=backend).check()


@pytest.mark.parametrize("one", CALLS, ids=str)
@pytest.mark.parametrize("backend", ["torch"])
def test_layers_of_the_networks(one, backend):
    """Their channels and groups, on fewer pixels."""
    check_layer(one, backend)


@pytest.mark.slow
@pytest.mark.parametrize("one", CALLS, ids=str)
@pytest.mark.parametrize("backend", [b for b in backends(OPERATOR) if b.values[0] != "torch"])
def test_layers_of_the_networks_fused(one, backend):
    check_layer(one, backend)


def check_layer(one, backend: str) -> None:
    rows = (("add",) if one.add else ()) + (("scale", "shift") if one.scale else ())
    channels, *pair = one.channels
    activation = "silu" if one.silu else None
    size = one.resolution if device_for(backend) == "cuda" else 4
    Case(
        (2, channels, size, size),
        one.num_groups,
        pair=sum(pair),
        rows=rows,
        activation=activation,
        backend=backend,
    ).check()


def test_the_networks_norms_are_those_of_the_paper():
    """Groups of 4 to 48 channels, many no power of two, and pairs whose seam lies within a group."""
    sizes = {sum(one.channels) // one.num_groups for one in CALLS}
    assert min(sizes) == 4 and max(sizes) == 48 and {6, 12, 18, 36} <= sizes
    assert {sum(one.channels) for one in CALLS} >= {128, 192, 256, 384, 576, 768, 960, 1152, 1536}
    straddling = [c for c in CALLS if len(c.channels) == 2 and c.channels[0] % (sum(c.channels) // c.num_groups)]
    assert straddling


LAYOUT_CASES = {
    "channel slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "channels_last slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


@BACKENDS
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_any_memory_layout_of_input_and_gradient(name, backend):
    case = Case((2, 8, 4, 3), 2, backend=backend)
    x, *rest = case.inputs
    change = LAYOUT_CASES[name]
    strange, dense = change(x.detach()).requires_grad_(), change(x.detach()).contiguous().requires_grad_()
    y, want = case.fused(strange, *rest), case.ref(dense, *rest)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=memory_format(strange))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    got = torch.autograd.grad(y, [strange, *rest], change(dy))
    wanted = torch.autograd.grad(want, [dense, *rest], change(dy).contiguous())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BACKENDS
@LAYOUTS
def test_results_are_dense_in_the_input_s_format(layout, backend):
    case = Case((2, 8, 4, 4), 2, layout=layout, backend=backend)
    y = case.fused(*case.inputs)
    assert y.is_contiguous(memory_format=layout)
    (dx,) = torch.autograd.grad(y.sum(), case.inputs[:1])  # the gradient of sum is expanded: all strides are zero
    assert dx.is_contiguous(memory_format=layout)


@BACKENDS
def test_a_mean_far_above_the_spread(backend):
    """Where E[x^2] - E[x]^2 has no digit left in float32."""
    x = torch.randn((2, 8, 6, 6), generator=torch.Generator().manual_seed(0)).to(device_for(backend)) + 3000
    weight, bias = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    want = group_norm_silu_ref(x.double(), 2, weight.double(), bias.double())
    got = group_norm_silu(x, 2, weight, bias, backend=backend)
    # x itself is rounded to 2^-12, one part in 4096 of its spread; nothing more may be lost
    assert (got - want).abs().max() < 1e-3


@BACKENDS
def test_samples_more_than_two_to_the_31_elements_apart(backend):
    """In x, in its gradient and in what the skip connection was sliced from; the memory between is never touched."""
    case = Case((2, 4, 3, 3), 2, pair=4, rows=(), backend=backend)
    if case.inputs[0].is_cuda:
        pytest.skip("takes the memory that a CPU only promises")
    far = [torch.empty(2**31 + 64).as_strided(t.shape, (2**31 + 16, 1, 12, 4)).copy_(t) for t in case.inputs[:2]]
    inputs = [t.detach().requires_grad_() for t in (*far, *case.inputs[2:])]
    y, want = case.fused(*inputs), case.ref(*case.inputs)
    torch.testing.assert_close(y, want)
    dy = torch.empty(2**31 + 128).as_strided(y.shape, (2**31 + 16, 1, 24, 8)).copy_(y.detach())
    got = torch.autograd.grad(y, inputs, dy)
    for a, b in zip(got, torch.autograd.grad(want, case.inputs, y.detach()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_tiles_two_to_the_32_elements_apart(backend):
    """Pixels 2^20 elements apart and more of them than a tile holds, in a batch that is not split over programs."""
    if device_for(backend) == "cuda":
        pytest.skip("takes the memory that a CPU only promises")
    dense = torch.randn((1, 1, 4097, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    memory = torch.empty(2**32 + 1, dtype=torch.float16)
    x = memory.as_strided(dense.shape, (1, 1, 2**20, 1)).copy_(dense).expand(8, 1, 4097, 1)
    weight, bias = torch.full((1,), 1.5), torch.ones(1)
    got = group_norm_silu(x, 1, weight, bias, backend=backend)
    torch.testing.assert_close(got, group_norm_silu_ref(dense, 1, weight, bias).expand(x.shape), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not has_extension(), reason="the extension gdd_fast._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_leaves_small_float32_maps_on_a_cpu_to_pytorch(dtype, monkeypatch):
    """Without gradients, where nothing is kept."""
    calls = []
    forward = fused.forward_cpp
    monkeypatch.setattr(fused, "forward_cpp", lambda *arguments: calls.append(1) or forward(*arguments))

    def is_fused(shape: tuple[int, ...], rows: tuple[str, ...] = (), **options) -> bool:
        calls.clear()
        case = Case(shape, 2, dtype=dtype, rows=rows, backend="cpp")
        with torch.no_grad():
            y = case.call(group_norm_silu, *case.inputs, **options)
        torch.testing.assert_close(y, case.ref(*case.inputs), rtol=0.02, atol=0.02)
        return bool(calls)

    small, medium, large = (1, 32, 16, 16), (2, 64, 64, 32), (2, 64, 64, 64)
    wide = dtype == torch.float32
    assert is_fused(small) is is_fused(medium) is (not wide)
    assert is_fused(large) and is_fused(medium, ("scale", "shift")) and is_fused(small, backend="cpp")


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


@BACKENDS
def test_statistics_of_a_residual_spare_the_norm_its_own(backend):
    generator = torch.Generator().manual_seed(0)
    h, skip = (torch.randn((2, 12, 12, 12), generator=generator).to(device_for(backend)) for _ in range(2))
    y, s = residual(h, skip, scale=0.7, statistics=True, backend=backend if backend == "triton" else "torch")
    other = torch.randn((2, 4, 12, 12), generator=generator).to(y.device)
    weight, bias = (torch.randn(16, generator=generator).to(y.device) for _ in range(2))
    want = group_norm_silu((y, other), 4, weight, bias, backend=backend)
    got = group_norm_silu((y, other), 4, weight, bias, statistics=(s, None), backend=backend)
    torch.testing.assert_close(got, want)


def saved_bytes(function) -> int:
    """Of distinct memory that autograd keeps when `function` runs."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(kept.values())


@BACKENDS
@pytest.mark.parametrize("pair", [0, 8])
def test_saves_its_input_and_little_else(pair, backend):
    """Whatever its size and whatever saves it, in Python or in C++."""
    case = Case((2, 8, 16, 16), 2, pair=pair, dtype=torch.bfloat16, backend=backend)
    maps = sum(t.nbytes for t in case.inputs[: 2 if pair else 1])
    assert saved_bytes(lambda: case.fused(*case.inputs)) < 1.1 * maps
    assert saved_bytes(lambda: case.ref(*case.inputs)) > 4 * maps


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
    arguments = (x, skip, 2, weight, bias, 1e-5, add, scale, shift, None, None, True, backend)
    opcheck(op, arguments)
    rows_apart = torch.zeros(2, 4, 3, 6, device=x.device).contiguous(memory_format=torch.channels_last)[..., :3]
    opcheck(op, (rows_apart, *arguments[1:]), test_utils=("test_schema", "test_faketensor"))
    _, mean, rstd = op(*(t.detach() if isinstance(t, Tensor) else t for t in arguments))
    tensors = [t.detach() for t in (torch.ones(2, 6, 3, 3, device=x.device), *case.inputs)]
    for needed in ([True] * 7, [False, True, False, True, True, False, False]):
        opcheck(
            torch.ops.gdd_fast.group_norm_silu_backward.default,
            (*tensors, mean, rstd, True, needed, backend),
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


@BACKENDS
def test_empty_batch(backend):
    case = Case((0, 4, 3, 3), 2, backend=backend)
    y = case.fused(*case.inputs)
    assert y.shape == (0, 4, 3, 3)
    gradients = torch.autograd.grad(y.sum(), case.inputs)
    assert [g.shape for g in gradients] == [t.shape for t in case.inputs]


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


def test_definition_is_the_formula():
    case = Case((2, 6, 3, 4), 3, dtype=torch.float64)
    x, weight, bias, add, scale, shift = case.inputs
    u = (x + add[:, :, None, None]).reshape(2, 3, 2 * 12)
    xhat = (u - u.mean(2, keepdim=True)) / (u.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    z = xhat.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    t = z * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(case.ref(*case.inputs), t / (1 + torch.exp(-t)))


def test_one_image_whose_batch_stride_means_nothing():
    """PyTorch's norm refuses channels_last memory whose batch of one has another stride, as transposed tokens have."""
    x = torch.randn(4 * 16).as_strided((1, 16, 2, 2), (16, 1, 32, 16)).requires_grad_()
    y = group_norm_silu(x, 4, torch.ones(16), torch.zeros(16), backend="torch")
    torch.testing.assert_close(y, group_norm_silu_ref(x, 4, torch.ones(16), torch.zeros(16)))
    torch.autograd.grad(y, x, torch.ones_like(y).as_strided(y.shape, x.stride()))
