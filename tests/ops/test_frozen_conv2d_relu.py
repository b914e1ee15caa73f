"""frozen_conv2d_relu: one bit per element for backward; the bits themselves are test_relu_bits.py's."""

import pytest
import torch

from gdd_fast.errors import BackendError, ConfigError, InputError
from gdd_fast.ops.frozen_conv2d_relu import OPERATOR, frozen_conv2d_relu, frozen_conv2d_relu_ref
from gdd_fast.ops.relu_bits import CEILING
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
FUSED = pytest.mark.parametrize("backend", backends(OPERATOR)[1:])
ACTIVATIONS = pytest.mark.parametrize("activation", CEILING)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
GEOMETRIES = [((2, 3, 7, 5), (5, 3, 3, 3), 1, 1, 1, 1), ((1, 4, 6, 6), (4, 1, 3, 3), 2, 1, 1, 4)]


def operands(shape, weight_shape, dtype, backend, layout=CHANNELS_LAST):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, weight_shape, weight_shape[:1])
    x, weight, bias = ((3 * torch.randn(s, generator=generator)).to(device_for(backend), dtype) for s in shapes)
    return x.contiguous(memory_format=layout).requires_grad_(), weight, bias.requires_grad_()


@BACKENDS
@ACTIVATIONS
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_parity(case, dtype, layout, activation, backend):
    shape, weight_shape, *geometry = case
    inputs = operands(shape, weight_shape, dtype, backend, layout)
    fused = lambda x, w, b: frozen_conv2d_relu(x, w, b, *geometry, activation=activation, backend=backend)
    ref = lambda x, w, b: frozen_conv2d_relu_ref(x, w, b, *geometry, activation=activation)
    assert_as_accurate_as_torch(fused, ref, inputs)
    x, weight, bias = inputs
    (dx,) = torch.autograd.grad(fused(x, weight, bias).sum(), x)
    assert dx.is_contiguous(memory_format=layout)


@BACKENDS
@ACTIVATIONS
def test_first_and_second_derivatives(activation, backend):
    x, weight, bias = operands((1, 2, 4, 4), (3, 2, 3, 3), torch.float64, backend)
    function = lambda x, bias: frozen_conv2d_relu(x, weight, bias, padding=1, activation=activation, backend=backend)
    torch.autograd.gradcheck(function, (x, bias))
    torch.autograd.gradgradcheck(lambda x, bias: function(x, bias).square(), (x, bias))


@FUSED
def test_keeps_the_weight_and_a_bit_an_element(backend):
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3), torch.float32, backend)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_conv2d_relu(x, weight, bias, padding=1, backend=backend)
    assert sorted(t.untyped_storage().nbytes() for t in kept) == [y.numel() // 8, 4 * weight.numel()]


@FUSED
def test_compiles_without_graph_breaks(backend):
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3), torch.float32, backend)
    function = lambda x: frozen_conv2d_relu(x * 2, weight, bias, backend=backend).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, function)))


@BACKENDS
def test_empty_batch_and_no_gradient(backend):
    x, weight, bias = operands((2, 4, 8, 8), (6, 4, 3, 3), torch.float32, backend)
    empty = x.detach()[:0].requires_grad_()
    y = frozen_conv2d_relu(empty, weight, bias, backend=backend)
    assert y.shape == (0, 6, 6, 6) and torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape
    with torch.no_grad():
        y = frozen_conv2d_relu(x, weight, bias, activation="relu6", backend=backend)
    assert torch.equal(y, frozen_conv2d_relu_ref(x, weight, bias, activation="relu6"))


def test_bad_calls_are_refused():
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 1, 1)
    with pytest.raises(ConfigError, match="'gelu'"):
        frozen_conv2d_relu(x, weight, activation="gelu")
    with pytest.raises(BackendError, match="no cuda implementation"):
        frozen_conv2d_relu(x, weight, backend="cuda")
    with pytest.raises(InputError, match="requires a gradient"):
        frozen_conv2d_relu(x, weight.requires_grad_())


@FUSED
def test_the_graph_is_kept_and_let_go_as_pytorchs(backend):
    """A second backward needs retain_graph, a weight changed in between is noticed, and each input may go without."""
    x, weight, bias = operands((1, 2, 4, 4), (3, 2, 3, 3), torch.float32, backend)
    y = frozen_conv2d_relu(x, weight, bias, padding=1, backend=backend)
    first = torch.autograd.grad(y.sum(), (x, bias), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), (x, bias))))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)
    y = frozen_conv2d_relu(x, weight, bias, padding=1, backend=backend)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    weight.div_(2)
    alone = frozen_conv2d_relu(x.detach(), weight, bias, padding=1, backend=backend)
    assert torch.equal(torch.autograd.grad(alone.sum(), bias)[0], first[1])
    assert torch.equal(
        torch.autograd.grad(frozen_conv2d_relu(x, weight, bias.detach(), padding=1, backend=backend).sum(), x)[0],
        first[0],
    )


@FUSED
def test_autocast_computes_in_its_type(backend):
    x, weight, bias = operands((1, 2, 4, 4), (3, 2, 3, 3), torch.float32, backend)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = frozen_conv2d_relu(x, weight, bias, padding=1, backend=backend)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), (x, bias))] == [torch.float32] * 2


@pytest.mark.parametrize("backend", [b for b in backends(OPERATOR) if b.values == ("triton",)])
@ACTIVATIONS
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("extension", [True, False])
def test_triton_adds_the_bias_and_the_convolution_does_not(extension, recorded, activation, backend, monkeypatch):
    """One pass over the result in place of two or three, by plans and without them: no operator of PyTorch reads the
    bias or writes the result after the convolution."""
    if not extension:
        monkeypatch.setattr("gdd_fast.ops.frozen_conv2d_relu.wanted", lambda x, backend: False)
    x, weight, bias = operands((2, 3, 8, 8), (16, 3, 3, 3), torch.bfloat16, backend)
    run = lambda: frozen_conv2d_relu(x, weight, bias, padding=1, activation=activation, backend=backend)
    want = frozen_conv2d_relu_ref(x, weight, bias, padding=1, activation=activation)
    with torch.set_grad_enabled(recorded):
        run()  # makes the plan
        with torch.profiler.profile(record_shapes=True) as profile:
            y = run()
    calls = {e.key: e.input_shapes for e in profile.key_averages(group_by_input_shape=True)}
    assert calls["aten::convolution"][2] == []
    assert not {"aten::add_", "aten::relu_", "aten::clamp_", "aten::hardtanh_"} & calls.keys()
    torch.testing.assert_close(y, want, rtol=1e-2, atol=5e-2)  # the bias is added to what is rounded, as on a GPU
