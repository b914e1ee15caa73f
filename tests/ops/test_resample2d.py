"""resample2d: as accurate as the depthwise convolutions that define it, in every layout, and its own derivative."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from gdd_fast.errors import BackendError, InputError
from gdd_fast.layers.convolution import resample_kernel
from gdd_fast.ops.resample2d import OPERATOR, resample2d, resample2d_ref
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
FUSED = pytest.mark.parametrize("backend", backends(OPERATOR)[1:])
DIRECTIONS = pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
# taps, padding: EDM's two filters, the border that was added by a convolution before, and a longer filter
FILTERS = {
    "box": ([1, 1], 0),
    "fir": ([1, 3, 3, 1], 1),
    "no border": ([1, 3, 3, 1], 0),
    "long": ([1, 5, 9, 7, 5, 2], 2),
}
SHAPES = [(2, 3, 6, 8), (1, 1, 7, 5), (2, 17, 4, 9), (3, 32, 5, 6), (1, 2, 6, 33)]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "channels_last slice": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "batch stride": lambda x: torch.stack([x, x], 1)[:, 1],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
    "unaligned": lambda x: one_further(x),
    "channels_last unaligned": lambda x: one_further(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}


def one_further(x):
    """x in memory that begins one number after that of an allocation."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def case(shape, name, up, dtype=torch.float32, backend="torch", seed=0):
    """Input, something to add, and the options of one call."""
    taps, padding = FILTERS[name]
    device = device_for(backend)
    generator = torch.Generator().manual_seed(seed)
    kernel = resample_kernel(taps).to(device)
    options = {"up": up, "padding": padding, "box": name == "box"}
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    add = torch.randn(resample2d_ref(x, kernel, **options).shape, generator=generator, dtype=torch.float64)
    return x, add.to(device, dtype), kernel, options


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parity_of_output_and_gradients(layout, name, dtype, up, backend):
    for shape in SHAPES:
        x, add, kernel, options = case(shape, name, up, dtype, backend)
        x, add = LAYOUTS[layout](x).requires_grad_(), LAYOUTS[layout](add).requires_grad_()
        assert_as_accurate_as_torch(
            lambda x, k=kernel, o=options: resample2d(x, k, **o, backend=backend),
            lambda x, k=kernel, o=options: resample2d_ref(x, k, **o),
            [x],
        )
        assert_as_accurate_as_torch(
            lambda x, a, k=kernel, o=options: resample2d(x, k, add=a, scale=0.7, **o, backend=backend),
            lambda x, a, k=kernel, o=options: resample2d_ref(x, k, add=a, scale=0.7, **o),
            [x, add],
        )


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, up, backend):
    for name in ("box", "fir"):
        x, _, kernel, options = case((3, 8, 6, 10), name, up, backend=backend)
        x = LAYOUTS[layout](x)
        y = resample2d(x, kernel, **options, backend=backend)
        torch.testing.assert_close(y, resample2d_ref(x.contiguous(), kernel, **options))
        channels_last = "channels_last" in layout
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def column_times_row(column, row):
    return torch.outer(torch.tensor(column), torch.tensor(row))[None, None]


ANY_FILTERS = {
    "not separable": torch.tensor([[0.0, 1, 1, 0], [1, 2, 2, 1], [1, 2, 2, 1], [0, 1, 1, 0]])[None, None] / 12,
    "long": column_times_row([1.0 / 66] * 66, [1.0 / 66] * 66),
    "zero": torch.zeros(1, 1, 2, 2),
    "negative taps": column_times_row([-1.0, 9, 9, -1], [-1.0, 9, 9, -1]) / 256,
    "sums to nothing": column_times_row([1.0, 3, 3, 1], [1.0, 1, -1, -1]) / 16,
    "half precision": column_times_row([1.0, 3, 3, 1], [1.0, 3, 3, 1]).bfloat16() / 64,
}


def filtered(kernel, up, backend, size=70):
    """One call with this filter, by an operator and by the definition in float64, and the latter's size."""
    x = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(device_for(backend))
    options = {"up": up, "padding": kernel.shape[3] // 2 - 1}
    kernel = kernel.to(x.device)
    want = resample2d_ref(x.double(), kernel.double(), **options)
    return lambda: resample2d(x, kernel, **options, backend=backend), want


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("name", ANY_FILTERS)
def test_any_filter_is_computed(name, backend, up):
    call, want = filtered(ANY_FILTERS[name], up, backend)
    torch.testing.assert_close(call().double(), want, rtol=1e-5, atol=1e-6)


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("name", FILTERS)
def test_derivatives(name, up, backend):
    for layout in ("contiguous", "channels_last"):
        x, add, kernel, options = case((2, 3, 5, 6), name, up, torch.float64, backend)
        inputs = [LAYOUTS[layout](t).requires_grad_() for t in (x, add)]

        def function(x, add, kernel=kernel, options=options):
            return resample2d(x, kernel, add=add, scale=0.6, **options, backend=backend)

        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(lambda x, add, f=function: f(x, add) ** 2, inputs, fast_mode=True)


@BACKENDS
@DIRECTIONS
def test_known_values(up, backend):
    device = device_for(backend)
    x = torch.zeros(1, 1, 4, 4, device=device)
    x[0, 0, 1, 1] = 1
    box, fir = (resample_kernel(taps).to(device) for taps in ([1, 1], [1, 3, 3, 1]))
    if up:
        row = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0.0], device=device)
        fir_row = torch.tensor([0, 1, 3, 3, 1, 0, 0, 0.0], device=device) / 4
    else:
        row = torch.tensor([1, 0.0], device=device) / 2
        fir_row = torch.tensor([3, 1.0], device=device) / 8
    for kernel, padding, values in ((box, 0, row), (fir, 1, fir_row)):
        y = resample2d(x, kernel, up=up, padding=padding, backend=backend)
        assert torch.equal(y[0, 0], torch.outer(values, values))


@BACKENDS
@DIRECTIONS
def test_repeats_to_the_bit(up, backend):
    x, add, kernel, options = case((3, 8, 16, 16), "fir", up, torch.bfloat16, backend)
    first, second = (resample2d(x, kernel, add=add, scale=0.7, **options, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@BACKENDS
@DIRECTIONS
def test_registration_and_compile(up, backend):
    for layout in ("contiguous", "channels_last", "channels_last slice", "rows apart"):
        x, add, kernel, options = case((2, 3, 4, 6), "fir", up, backend=backend)
        x, add = LAYOUTS[layout](x).requires_grad_(), add.requires_grad_()
        gain = 4.0 if up else 1.0
        arguments = (x, kernel, add, up, options["padding"], *add.shape[2:], gain, 0.7, False, backend)
        opcheck(torch.ops.gdd_fast.resample2d.default, arguments)
    function = lambda x: resample2d(x * 2, kernel, **options, backend=backend).square()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, function)]
    torch.testing.assert_close(*grads)


@BACKENDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_batched_gradients_and_tracing(backend):
    """Some look into a call through tensors that stand for others."""
    x, _, kernel, options = case((1, 2, 4, 4), "fir", False, backend=backend)
    function = lambda x: resample2d(x, kernel, **options, backend=backend)
    rows = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), rows)
    traced = torch.jit.trace(function, x)
    torch.testing.assert_close(traced(x + 1), function(x + 1))


@BACKENDS
def test_a_border_without_an_image(backend):
    """Zeros, where a filter reaches over an image that has no columns."""
    kernel = resample_kernel([1, 3, 3, 1]).to(device_for(backend))
    for channels in (1, 64):
        x = LAYOUTS["channels_last"](torch.zeros(1, channels, 4, 0, device=kernel.device))
        y = resample2d(x, kernel, up=True, padding=0, backend=backend)
        assert torch.equal(y, torch.zeros_like(y)) and y.shape == (1, channels, 10, 2)
        assert resample2d(x, kernel, up=False, padding=1, backend=backend).shape == (1, channels, 2, 0)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty(shape, backend):
    kernel = resample_kernel([1, 3, 3, 1]).to(device_for(backend))
    x = torch.zeros(shape, device=device_for(backend), requires_grad=True)
    y = resample2d(x, kernel, up=True, padding=1, backend=backend)
    assert y.shape == (*shape[:2], 8, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@BACKENDS
def test_saves_nothing_of_the_images_size(backend):
    x, add, kernel, options = case((2, 8, 16, 16), "fir", True, backend=backend)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        resample2d(x.requires_grad_(), kernel, add=add.requires_grad_(), **options, backend=backend)
    assert sum(saved) <= kernel.numel()


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinity_stays_where_it_belongs(layout, up, backend):
    """Taps outside the image count as zero, and neighbours in memory are not neighbours in the image."""
    kernel = resample_kernel([1, 3, 3, 1]).to(device_for(backend))
    x = LAYOUTS[layout](torch.zeros(2, 3, 6, 6, device=kernel.device))
    for place in ((0, 1, 0, 0), (0, 2, 5, 5), (1, 0, 0, 5), (1, 0, 5, 0)):
        x.zero_()[place] = torch.inf
        y = resample2d(x, kernel, up=up, padding=1, backend=backend)
        want = resample2d_ref(x.contiguous(), kernel, up=up, padding=1)
        assert torch.equal(y, want)


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("shape", [(3, 70, 9, 14), (1, 2, 6, 5000), (2, 1, 300, 3)], ids=str)
def test_many_and_long_rows(shape, up, backend):
    """More rows, and a longer one, than a block works on at a time."""
    x, add, kernel, options = case(shape, "fir", up, backend=backend)
    for layout in ("contiguous", "channels_last"):
        y = resample2d(LAYOUTS[layout](x), kernel, add=add, scale=0.5, **options, backend=backend)
        torch.testing.assert_close(y, resample2d_ref(x, kernel, add=add, scale=0.5, **options))


@FUSED
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 3.0], ids=["exact", "rounded", "beyond the range"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_and_rounded_as_pytorch_does(dtype, layout, scale, backend):
    """The mean of four equal numbers is that number: all of them, subnormal, infinite and NaN too."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(device_for(backend))
    x = LAYOUTS[layout](every.view(1, 16, 64, 64).repeat_interleave(2, 2).repeat_interleave(2, 3))
    y = resample2d(x, resample_kernel([1, 1]).to(x.device), up=False, padding=0, scale=scale, backend=backend)
    want = (every.float() * scale).to(dtype).view(1, 16, 64, 64)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@FUSED
def test_subnormal_halves_are_no_subnormal_floats(backend):
    kernel = resample_kernel([1, 1]).to(device_for(backend))
    x = torch.full((1, 2, 4, 4), 2**-24, dtype=torch.float16, device=kernel.device)
    flushes = torch.set_flush_denormal(True)
    try:
        y = resample2d(x, kernel, up=False, padding=0, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, x[..., :2, :2]) and flushes


def test_bad_input_is_refused():
    x, kernel = torch.zeros(1, 2, 4, 4), resample_kernel([1, 3, 3, 1])
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        resample2d(x[0], kernel, up=True, padding=1)
    with pytest.raises(InputError, match="int32"):
        resample2d(x.int(), kernel, up=True, padding=1)
    with pytest.raises(InputError, match="K even"):
        resample2d(x, kernel[..., :3, :3], up=True, padding=1)
    with pytest.raises(InputError, match="smaller than the filter"):
        resample2d(x[..., :1, :1], kernel, up=False, padding=0)
    with pytest.raises(InputError, match="like the result"):
        resample2d(x, kernel, up=True, padding=1, add=x)
    with pytest.raises(InputError, match="without gradient"):
        resample2d(x, kernel.clone().requires_grad_(), up=True, padding=1)
    with pytest.raises(InputError, match="floating"):
        resample2d(x, kernel.long(), up=True, padding=1)
    with pytest.raises(InputError, match="box"):
        resample2d(x, kernel, up=True, padding=1, box=True)
    with pytest.raises(BackendError, match="no triton implementation"):
        resample2d(x, kernel, up=True, padding=1, backend="triton")
