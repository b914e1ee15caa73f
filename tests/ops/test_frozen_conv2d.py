"""frozen_conv2d: PyTorch's convolution to the bit, without keeping the input, differentiable any number of times."""

import pytest
import torch
from torch.nn import functional as F

from gdd_fast.backend import has_extension
from gdd_fast.errors import InputError
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d, frozen_conv2d_ref

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
        monkeypatch.setattr("gdd_fast.ops.frozen_conv2d.has_extension", lambda: False)
    elif not has_extension():
        pytest.skip("the extension gdd_fast._C is not built")


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
    want, got = frozen_conv2d_ref(x, weight, bias, *geometry), frozen_conv2d(x, weight, bias, *geometry)
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
