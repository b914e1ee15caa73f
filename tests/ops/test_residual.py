"""residual: as accurate as eager torch, in any layout; its statistics are those of what it returns."""

import math

import pytest
import torch
from torch.library import opcheck

from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops._memory_format import channel_statistics_ref, statistics_parts
from gdd_fast.ops.residual import OPERATOR, residual, residual_ref
from parity import assert_as_accurate_as_torch, backends, device_for, promised

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
SCALE = math.sqrt(0.5)


def tensors(shape, backend, dtype=torch.float32, layout=torch.channels_last, bias=True):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(device_for(backend), dtype) for _ in range(2)]
    maps = [t.contiguous(memory_format=layout).requires_grad_() for t in maps]
    row = torch.randn(shape[1], generator=generator).to(maps[0].device).requires_grad_()
    return [*maps, row] if bias else maps


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_as_accurate_as_torch(dtype, layout, backend):
    inputs = tensors((2, 10, 5, 7), backend, dtype, layout)
    assert_as_accurate_as_torch(
        lambda *t: residual(*t, SCALE, backend=backend), lambda *t: residual_ref(*t, SCALE), inputs
    )
    inputs = tensors((1, 3, 1, 1), backend, dtype, layout, bias=False)
    assert_as_accurate_as_torch(lambda *t: residual(*t, backend=backend), residual_ref, inputs)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (9, 15), (16, 16)], ids=str)
def test_statistics_of_the_result(size, dtype, backend):
    y, s = residual(*tensors((2, 10, *size), backend, dtype), SCALE, statistics=True, backend=backend)
    assert s.shape == (2, statistics_parts(size[0] * size[1]), 2, 10) and not s.requires_grad and y.requires_grad
    torch.testing.assert_close(s, channel_statistics_ref(y), rtol=1e-5, atol=1e-5)
    runs = y.detach().double().flatten(2).split(-(-size[0] * size[1] // s.shape[1]), 2)
    for i, run in enumerate(runs):
        torch.testing.assert_close(s[:, i, 0].double(), run.mean(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s[:, i, 1].double(), run.var(2, correction=0) * run.shape[2], rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("outlier", [0, 32, 63], ids=lambda i: f"pixel {i}")
def test_statistics_far_from_zero_and_with_an_outlier(outlier, backend):
    """What a run is summed less of may be its oddest value, and its mean far above its spread."""
    h = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)) + 1000
    h.view(1, 4, 64)[:, :, outlier] += torch.tensor([0.0, 10.0, 100.0, -3000.0])
    h = h.to(device_for(backend))
    _, s = residual(h, torch.zeros_like(h), statistics=True, backend=backend)
    want = h.double().flatten(2)
    torch.testing.assert_close(s[:, 0, 0].double(), want.mean(2), rtol=5e-7, atol=0)
    torch.testing.assert_close(s[:, 0, 1].double(), want.var(2, correction=0) * 64, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 130, 1000, 1024, 4096, 1025, 99991])
def test_no_run_of_pixels_is_empty(pixels):
    parts = statistics_parts(pixels)
    chunk = -(-pixels // parts)
    assert 1 <= parts <= 16 and 0 < pixels - (parts - 1) * chunk <= chunk


@BACKENDS
def test_mixed_and_strange_layouts(backend):
    h, skip, bias = (t.detach() for t in tensors((2, 6, 4, 3), backend))
    want = residual_ref(h, skip, bias, SCALE)
    slice_of = torch.cat([skip, skip], 1)[:, 6:]
    for a, b in ((h, skip.contiguous()), (h.mT.contiguous().mT, slice_of), (slice_of, h)):
        expected = want if a is not slice_of else residual_ref(skip, h, bias, SCALE)
        y = residual(a, b, bias, SCALE, backend=backend)
        torch.testing.assert_close(y, expected)


@BACKENDS
def test_repeats_to_the_bit(backend):
    inputs = tensors((1, 10, 16, 16), backend)
    first, again = (residual(*inputs, SCALE, statistics=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@BACKENDS
def test_samples_more_than_two_to_the_31_elements_apart(backend):
    h, skip = (t.detach() for t in tensors((2, 4, 3, 3), backend, bias=False))
    if h.is_cuda:
        pytest.skip("takes the memory that a CPU only promises")
    far = promised(2**31 + 64).as_strided(h.shape, (2**31 + 16, 1, 12, 4)).copy_(h)
    torch.testing.assert_close(residual(far, skip, scale=SCALE, backend=backend), residual_ref(h, skip, None, SCALE))


@BACKENDS
def test_saves_nothing(backend):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        residual(*tensors((2, 6, 4, 3), backend), SCALE, backend=backend)
    assert saved == []


def test_gradients_once_and_twice():
    inputs = [t.detach().double().requires_grad_() for t in tensors((2, 3, 2, 2), "torch")]
    assert torch.autograd.gradcheck(lambda *t: residual(*t, SCALE), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: residual(*t, SCALE), inputs)


def test_registration_and_compile():
    backend = backends(OPERATOR)[-1]
    if backend.marks:
        pytest.skip(backend.marks[0].kwargs["reason"])
    inputs = tensors((2, 6, 4, 3), "triton")
    for statistics in (False, True):
        opcheck(torch.ops.gdd_fast.residual.default, (*inputs, SCALE, statistics))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: residual(*t, SCALE, backend="triton") * 2, fullgraph=True, backend="aot_eager")
    y, want = compiled(*inputs), residual_ref(*inputs, SCALE) * 2
    torch.testing.assert_close(y, want)
    got, expected = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@BACKENDS
def test_empty_batch(backend):
    inputs = tensors((0, 6, 4, 3), backend)
    y = residual(*inputs, backend=backend)
    assert y.shape == (0, 6, 4, 3)
    torch.autograd.grad(y.sum(), inputs)


X = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[:, :2]), "of one shape"),
        ((X[0], X[0]), r"\(N, C, H, W\)"),
        ((X, X.half()), "of one dtype"),
        ((X, X, torch.zeros(3)), "bias must be"),
        ((X, X.to("meta")), "skip is on meta"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        residual(*arguments)


def test_backend_by_name_is_obeyed_or_refused():
    with pytest.raises(BackendError, match="no cuda implementation"):
        residual(X, X, backend="cuda")
