"""max_pool2x2: PyTorch's pooling to the bit, one byte per output for backward."""

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.library import opcheck
from torch.nn import functional as F

from benchmarks.counts.offline import TritonCase, compile_triton
from gdd_fast.backend import extension
from gdd_fast.errors import InputError
from gdd_fast.ops.max_pool2x2 import OPERATOR, max_pool2x2, max_pool2x2_ref
from parity import backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
FUSED = pytest.mark.parametrize("backend", backends(OPERATOR)[1:])
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def images(shape, dtype, backend, layout=CHANNELS_LAST):
    """Few different values, so that many windows have several largest ones."""
    x = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(0))
    return x.to(device_for(backend), dtype).contiguous(memory_format=layout).requires_grad_()


@BACKENDS
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 7, 5), (3, 1, 2, 2), (1, 4, 2, 3)], ids=str)
def test_equals_pytorch_in_every_bit(shape, dtype, layout, backend):
    x = images(shape, dtype, backend, layout)
    got, want = max_pool2x2(x, backend), max_pool2x2_ref(x)
    assert torch.equal(got, want) and got.is_contiguous(memory_format=layout)
    dy = torch.cat([torch.randn_like(want)] * 2, 1)[:, shape[1] :]
    dx, want_dx = (torch.autograd.grad(y, x, dy)[0] for y in (got, want))
    assert torch.equal(dx, want_dx) and dx.is_contiguous(memory_format=layout)


@FUSED
def test_places_equal_the_definition(backend):
    x = images((2, 3, 7, 6), torch.float32, backend).detach()
    y, places = torch.ops.gdd_fast.max_pool2x2(x, backend)
    want, index = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want) and torch.equal(places, (index // 6 % 2 * 2 + index % 6 % 2).to(torch.uint8))
    dx = torch.ops.gdd_fast.max_pool2x2_backward(y, places, 7, 6, True, backend)
    assert torch.equal(dx, F.max_unpool2d(y, index, 2, output_size=(7, 6)))


@BACKENDS
def test_nan_wins(backend):
    x = torch.tensor([[1.0, math.nan], [3.0, 4.0]], device=device_for(backend)).view(1, 1, 2, 2)
    assert max_pool2x2(x, backend).isnan().all()


@BACKENDS
def test_first_and_second_derivatives(backend):
    x = torch.randperm(2 * 3 * 5 * 4).double().view(2, 3, 5, 4).to(device_for(backend)).requires_grad_()
    torch.autograd.gradcheck(lambda x: max_pool2x2(x, backend), (x,))
    torch.autograd.gradgradcheck(lambda x: max_pool2x2(x, backend).square(), (x,))


@FUSED
def test_keeps_a_byte_an_output(backend):
    kept = []
    x = images((2, 3, 8, 8), torch.float32, backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool2x2(x, backend)
    assert [t.untyped_storage().nbytes() for t in kept] == [y.numel()]


@FUSED
def test_registration_and_compile(backend):
    for layout in (CHANNELS_LAST, CONTIGUOUS):
        x = images((2, 3, 5, 4), torch.float32, backend, layout).detach()
        opcheck(torch.ops.gdd_fast.max_pool2x2.default, (x, backend))
        y, places = torch.ops.gdd_fast.max_pool2x2(x, backend)
        opcheck(torch.ops.gdd_fast.max_pool2x2_backward.default, (y, places, 5, 4, layout is CHANNELS_LAST, backend))
    x.requires_grad_()
    function = lambda x: max_pool2x2(x * 2, backend).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, function)))


@BACKENDS
def test_empty_batch(backend):
    x = images((0, 3, 4, 4), torch.float32, backend)
    y = max_pool2x2(x, backend)
    assert y.shape == (0, 3, 2, 2) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_bad_calls():
    for x in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 4, 4, dtype=torch.int32)):
        with pytest.raises(InputError, match="at least 2x2"):
            max_pool2x2(x)


@FUSED
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 40), (3, 2, 37, 67), (1, 1, 2, 2100)], ids=str)
def test_maps_of_several_tiles(shape, layout, backend):
    """Tiles that are cut off by the last channel, pixel and row."""
    x = images(shape, torch.float32, backend, layout)
    got, want = max_pool2x2(x, backend), max_pool2x2_ref(x)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


def test_triton_kernels_compile_for_ampere_and_hopper():
    options, cases = {"num_warps": 4}, []
    kinds = {
        "channels_last": (("H", "W", "C", "pixel_blocks", "channel_blocks"), {"BLOCK_P": 16, "BLOCK_C": 64}),
        "contiguous": (("rows", "H", "parts", "column_blocks"), {"BLOCK_R": 8, "BLOCK_W": 128}),
    }
    half = {"BLOCK_R": 4, "BLOCK_W": 128}  # as `max_pool2x2_backward` launches them
    for dtype in ("*fp32", "*bf16", "*fp64"):
        for name, (sizes, constants) in kinds.items():
            for kernel, maps in ((f"{name}_kernel", "xy"), (f"{name}_backward_kernel", ("dy", "dx"))):
                signature = {**dict.fromkeys(maps, dtype), "places": "*u8", **dict.fromkeys(sizes, "i32")}
                tile = half if kernel == "contiguous_backward_kernel" else constants
                parts = (1, 2, 16) if name == "contiguous" else (None,)  # odd rows, even ones, those of most networks
                tiles = [tile if part is None else {**tile, "PART": part} for part in parts]
                cases += [TritonCase(kernel, signature, each, options) for each in tiles]
    for resources in compile_triton("gdd_fast.kernels.max_pool2x2", cases):
        resources.assert_no_spills()


@pytest.mark.skipif(extension() is None, reason="gdd_fast._C is not built")
def test_a_derivative_of_forward_mode_is_refused_and_not_lost():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(1, 2, 4, 4), torch.ones(1, 2, 4, 4))
        with pytest.raises(RuntimeError, match="jvp"):
            max_pool2x2(x, "cpp")
