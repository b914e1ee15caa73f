"""frozen_conv2d: PyTorch's convolution without keeping the input, differentiable any number of times.

It is PyTorch's to the bit, but where a processor has something faster; those cases stand at the end.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from gdd_fast.backend import has_extension
from gdd_fast.errors import InputError
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d, frozen_conv2d_ref
from gdd_fast.ops.frozen_conv2d_relu import frozen_conv2d_relu, frozen_conv2d_relu_ref
from gdd_fast.ops.winograd_conv2d import takes
from parity import assert_as_accurate_as_torch

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# input shape, weight shape, stride, padding, dilation, groups
CASES = [
    ((2, 4, 8, 8), (6, 4, 3, 3), 1, 1, 1, 1),
    ((1, 4, 7, 9), (6, 4, 1, 1), 1, 0, 1, 1),
    ((2, 6, 9, 8), (6, 1, 5, 5), 2, 2, 1, 6),  # the last row is not covered: the gradient is longer than it
    ((2, 4, 9, 9), (6, 2, 3, 3), (2, 1), (1, 0), 2, 2),
    ((1, 1, 5, 5), (3, 1, 2, 2), 1, 0, 1, 1),
]


@pytest.fixture(autouse=True, params=["extension", "python"])
def autograd(request, monkeypatch):
    """Who does autograd's part, which no result depends on."""
    if request.param == "python":
        monkeypatch.setattr("gdd_fast.ops.frozen_conv2d.extension", lambda: None)
    elif not has_extension():
        pytest.skip("the extension gdd_fast._C is not built")
    return request.param


def operands(shape, weight_shape, dtype=torch.float32, layout=CONTIGUOUS):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in (shape, weight_shape, weight_shape[:1])]
    x, weight, bias = (t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in tensors)
    return x.requires_grad_(), weight, bias.requires_grad_()


def saved(function):
    """The result of `function` and the tensors that it keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function()
    return y, kept


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch_in_every_bit(case, dtype, layout):
    shape, weight_shape, *geometry = case
    x, weight, bias = operands(shape, weight_shape, dtype, layout)
    backend = "torch" if weight_shape[2:] == (1, 1) and layout == CHANNELS_LAST else "auto"  # see the end of this file
    want = frozen_conv2d_ref(x, weight, bias, *geometry)
    got = frozen_conv2d(x, weight, bias, *geometry, backend=backend)
    assert torch.equal(got, want) and got.stride() == want.stride()
    # a slice, as most gradients in a U-Net are
    dy = torch.cat([torch.randn_like(want)] * 2, 1)[:, : want.shape[1]]
    (dx, db), (want_dx, want_db) = (torch.autograd.grad(y, (x, bias), dy) for y in (got, want))
    assert torch.equal(dx, want_dx) and dx.stride() == want_dx.stride()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(db, want_db, rtol=8 * eps, atol=100 * eps)  # a sum in another order


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivatives(case):
    shape, weight_shape, *geometry = case
    x, weight, bias = operands(shape, weight_shape, torch.float64)
    function = lambda x, bias: frozen_conv2d(x, weight, bias, *geometry)
    torch.autograd.gradcheck(function, (x, bias))
    torch.autograd.gradgradcheck(function, (x, bias))
    torch.autograd.gradgradcheck(lambda x: frozen_conv2d(x, weight, None, *geometry).square(), (x,))


def test_keeps_the_weight_alone():
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3))
    y, kept = saved(lambda: frozen_conv2d(x, weight, bias, padding=1))
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
    dy = torch.ones_like(y, requires_grad=True)
    _, kept = saved(lambda: torch.autograd.grad(y, x, dy, create_graph=True))
    assert {t.data_ptr() for t in kept} == {weight.data_ptr()}


def test_no_gradient_that_is_not_wanted():
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3))
    (only_bias,) = torch.autograd.grad(frozen_conv2d(x.detach(), weight, bias).sum(), bias)
    assert torch.equal(only_bias, torch.full((6,), 72.0))
    (only_x,) = torch.autograd.grad(frozen_conv2d(x, weight, bias.detach()).sum(), x)
    assert only_x.shape == x.shape
    assert not frozen_conv2d(x.detach(), weight).requires_grad


def test_channels_last_survives_both_derivatives():
    x, weight, _ = operands((2, 6, 8, 8), (6, 1, 3, 3), layout=CHANNELS_LAST)
    y = frozen_conv2d(x, weight, padding=1, groups=6)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert all(t.is_contiguous(memory_format=CHANNELS_LAST) for t in (y, dx, ddx))


def test_autocast():
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3))
    results = []
    for function in (F.conv2d, frozen_conv2d):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, bias)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, bias))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_compiles_without_a_break():
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3))
    function = lambda x, bias: frozen_conv2d(x * 2, weight, bias).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(x, bias), (x, bias)) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(got, want)


def test_bad_calls_are_refused():
    x, weight, _ = operands((2, 4, 8, 8), (6, 4, 3, 3))
    with pytest.raises(InputError, match="requires a gradient"):
        frozen_conv2d(x, weight.requires_grad_())
    with pytest.raises(InputError, match=r"\(4, 8, 8\)"):
        frozen_conv2d(x[0], weight)
    weight.requires_grad_(False)
    with pytest.raises(InputError, match="weight is on meta"):
        frozen_conv2d(x, weight.to("meta"))
    with pytest.raises(InputError, match="floating"):
        frozen_conv2d(x.detach().int(), weight)


def test_empty_batch():
    x, weight, bias = operands((0, 4, 8, 8), (6, 4, 3, 3))
    y = frozen_conv2d(x, weight, bias)
    assert y.shape == (0, 6, 6, 6)
    dx, db = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape and not db.any()


# --- a weight of another type or layout ---


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("pad", [(), (1, 0, 2, 1)], ids=str)
def test_converted_weight(layout, pad):
    weight = torch.randn(6, 4, 3, 3)
    got = converted(weight, torch.bfloat16, layout, pad)
    assert torch.equal(got, F.pad(weight, pad).bfloat16() if pad else weight.bfloat16())
    assert got.is_contiguous(memory_format=layout)
    assert converted(got, torch.bfloat16, layout) is got  # nothing to convert


def test_a_weight_converted_in_inference_mode_does_not_hinder_training():
    conv = FrozenConv2d(4, 6, 3).to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    conv.bias.data = conv.bias.data.bfloat16()
    with torch.inference_mode():
        conv(x)
    x.requires_grad_()
    torch.autograd.grad(conv(x).float().sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_with_a_frozen_weight_equals_the_trainable_one(dtype):
    torch.manual_seed(0)
    layer = Conv2d(4, 8, 3, down=True, resample_filter=[1, 3, 3, 1], conv_first=True)
    x = torch.randn(2, 4, 8, 8, dtype=dtype).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    want = layer(x)
    want_dx, want_db = torch.autograd.grad(want.float().square().sum(), (x, layer.bias))
    layer.weight.requires_grad_(False)
    got = layer(x)
    dx, db = torch.autograd.grad(got.float().square().sum(), (x, layer.bias))
    assert torch.equal(got, want) and torch.equal(dx, want_dx) and dx.stride() == want_dx.stride()
    torch.testing.assert_close(db, want_db, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert layer.weight.grad is None


# --- what is not the library's: float32, channels_last, on a CPU with the extension ---

# maps, weight: 1x1 convolutions of few pixels, and 3x3 ones of many with channels of whole vectors
PRODUCTS = [((2, 48, 1, 1), (20, 48, 1, 1)), ((3, 12, 5, 7), (9, 12, 1, 1)), ((1, 1, 4, 4), (3, 1, 1, 1))]
WINOGRAD = [((1, 32, 16, 16), (64, 32, 3, 3)), ((4, 64, 7, 9), (32, 64, 3, 3)), ((16, 32, 3, 5), (32, 32, 3, 3))]
WINOGRAD += [((5, 32, 15, 17), (64, 32, 3, 3))]  # of more tiles than go through all steps together
METHODS = pytest.mark.parametrize("case", [*PRODUCTS, *WINOGRAD], ids=str)
HAS_KERNELS = pytest.mark.skipif(
    not (has_extension() and takes(torch.empty(32, 32, 3, 3))), reason="there are no kernels for this processor"
)


def case_operands(case, layout=CHANNELS_LAST):
    x, weight, bias = operands(*case, layout=layout)
    if layout == CHANNELS_LAST:  # in its strides too where a map has one pixel
        x = torch.empty(x.shape, memory_format=layout).copy_(x.detach()).requires_grad_()
    return x, weight / weight[0].numel() ** 0.5, bias, weight.shape[-1] // 2


@HAS_KERNELS
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("weights", ["channels_last", "contiguous", "a slice"])
@METHODS
def test_is_as_accurate_as_pytorch(case, weights, layout):
    """A product as parity asks; Winograd's method, as test_winograd_conv2d.py does, within five times in norm."""
    x, weight, bias, padding = case_operands(case, layout)
    if weights == "contiguous":
        weight = weight.contiguous()
    elif weights == "a slice":
        weight = torch.cat([weight, weight], 1)[:, : weight.shape[1]]
    for ours, definition in ((frozen_conv2d, frozen_conv2d_ref), (frozen_conv2d_relu, frozen_conv2d_relu_ref)):
        function, ref = (partial(f, padding=padding) for f in (ours, definition))
        if case in PRODUCTS:
            assert_as_accurate_as_torch(function, ref, (x, weight, bias))
            continue
        exact, eager, got = ([], [], [])
        for f, dtype, found in (
            (ref, torch.float64, exact),
            (ref, torch.float32, eager),
            (function, torch.float32, got),
        ):
            leaf = x.detach().to(dtype).requires_grad_()
            y = f(leaf, weight.to(dtype), bias.to(dtype))
            found += [y, *torch.autograd.grad(y, leaf, torch.cat([y.detach(), y.detach()], 1)[:, : y.shape[1]])]
        for e, t, g in zip(exact, eager, got, strict=True):
            error, allowed = ((v - e).norm() / e.norm() for v in (g, t))
            assert error <= 5 * max(allowed, 1e-7)


@HAS_KERNELS
@METHODS
def test_strides_are_the_librarys(case):
    x, weight, bias, padding = case_operands(case)
    results = []
    for function in (frozen_conv2d_ref, frozen_conv2d):
        y = function(x, weight, bias, padding=padding)
        dy = torch.cat([torch.ones_like(y)] * 2, 1)[:, : y.shape[1]]
        (dx,) = torch.autograd.grad(y, x, dy)
        with torch.no_grad():
            results.append([t.stride() for t in (y, dx, function(x, weight, bias, padding=padding))])
    assert results[0] == results[1]


@METHODS
def test_second_derivatives_of_every_method(case):
    """What R1 takes: the norm of the input's gradient, differentiated by the input; against the library's."""
    x, weight, bias, padding = case_operands(case)
    found = []
    for function in (frozen_conv2d_ref, frozen_conv2d):
        y = function(x, weight, bias, padding=padding)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, bias)))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@METHODS
def test_nothing_is_remembered_of_a_weight(case):
    """A write that autograd does not see is in the next forward and in the next gradient."""
    x, weight, _, padding = case_operands(case)
    before = frozen_conv2d(x, weight, padding=padding)
    (dx,) = torch.autograd.grad(before.sum(), x)
    weight.data.mul_(2)
    after = frozen_conv2d(x, weight, padding=padding)
    assert torch.equal(after, 2 * before) and torch.equal(torch.autograd.grad(after.sum(), x)[0], 2 * dx)


@pytest.fixture
def two_threads():
    """The rule knows the threads: with more of them than panels a weight is transformed as a whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@HAS_KERNELS
@pytest.mark.usefixtures("two_threads")
def test_which_method_runs(autograd):
    """Other shapes, types, layouts and `backend="torch"` are the library's, to the bit."""
    if autograd == "python":
        pytest.skip("without the extension all are the library's")

    def library(x, weight, padding, **options) -> bool:
        """Whether the library convolves, forward, backward and without gradients."""
        with torch.profiler.profile() as profile:
            frozen_conv2d(x, weight, padding=padding, **options).sum().backward()
            frozen_conv2d(x.detach(), weight, padding=padding, **options)
        counts = {e.key: e.count for e in profile.key_averages()}
        found = counts.get("aten::convolution", 0), counts.get("aten::convolution_backward", 0)
        assert found in ((2, 1), (0, 0)), found
        return found == (2, 1)

    for case in (PRODUCTS[1], WINOGRAD[0]):
        x, weight, _, padding = case_operands(case)
        assert not library(x, weight, padding) and library(x, weight, padding, backend="torch")
        for dtype, layout in (
            (torch.bfloat16, CHANNELS_LAST),
            (torch.float64, CHANNELS_LAST),
            (torch.float32, CONTIGUOUS),
        ):
            other, w = (t.detach().to(dtype).contiguous(memory_format=layout) for t in (x, weight))
            converted = case in WINOGRAD and layout == CONTIGUOUS  # brought to channels_last and back
            assert library(other.requires_grad_(), w, padding) != converted
    few_pixels, pixels = (case_operands(((1, 32, size, 16), (32, 32, 3, 3)))[:2] for size in (11, 12))
    assert library(*few_pixels, 1) and not library(*pixels, 1)
    for size in ((1, 1), (2, 2), (1, 64), (5, 5), (3, 3), (6, 6)):  # edges cut the method's tiles of 4x4
        maps = case_operands(((192, 32, *size), (32, 32, 3, 3)))[:2]
        assert library(*maps, 1) == (size not in ((3, 3), (6, 6))), size
    for few, enough in ((11, 12), (95, 96)):  # 36 MiB transformed: in parts up to 64 tiles, beyond as a whole
        few_pixels, pixels = (case_operands(((n, 512, 4, 4), (512, 512, 3, 3)))[:2] for n in (few, enough))
        assert library(*few_pixels, 1) and not library(*pixels, 1)
    few_pixels, pixels = (case_operands(((1, 32, size, 32), (32, 32, 1, 1)))[:2] for size in (32, 33))
    assert library(*pixels, 0) and not library(*few_pixels, 0)


@HAS_KERNELS
def test_threads_do_not_change_results():
    """Where its panels are fewer than the threads, Winograd's weight is transformed as a whole."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            x, weight, bias, padding = case_operands(WINOGRAD[0])
            y = frozen_conv2d(x, weight, bias, padding=padding)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@HAS_KERNELS
def test_transforms_and_forward_mode_see_the_library():
    x, weight, _, padding = case_operands(WINOGRAD[0])
    stack = torch.stack([x.detach()] * 2)
    with torch.no_grad():
        mapped = torch.vmap(lambda t: frozen_conv2d(t, weight, padding=padding))(stack)
        torch.testing.assert_close(mapped[1], F.conv2d(x, weight, padding=padding))
        _, tangent = torch.func.jvp(lambda t: frozen_conv2d(t, weight, padding=padding), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(tangent, F.conv2d(x.detach(), weight, padding=padding))


@HAS_KERNELS
@pytest.mark.parametrize("size", [1, 3])
def test_a_result_is_nobodys_view_and_a_bias_is_checked(size):
    """Of 1x1 windows, computed as a matrix product, and of Winograd's."""
    x, weight, bias = torch.randn(2, 16, 16, 16), torch.randn(16, 16, size, size), torch.randn(16)
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    y = frozen_conv2d(x.requires_grad_(), weight, bias, padding=size // 2)
    y.relu_()
    y.sum().backward()
    assert x.grad is not None
    with pytest.raises((InputError, RuntimeError), match=r"bias|size"):
        frozen_conv2d(x.detach(), weight, torch.randn(1), padding=size // 2)
    for moved in (1, 2):
        with torch.autograd.forward_ad.dual_level():
            inputs = [x.detach(), weight, bias]
            inputs[moved] = torch.autograd.forward_ad.make_dual(inputs[moved], torch.ones_like(inputs[moved]))
            y = frozen_conv2d(*inputs, padding=size // 2)
            want = F.conv2d(*inputs, padding=size // 2)
            tangents = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in (y, want)]
            torch.testing.assert_close(*tangents)
