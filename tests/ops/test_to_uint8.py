"""to_uint8: every implementation equals the definition in every bit, whatever the layout, dtype and values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from benchmarks.counts.offline import TritonCase, compile_triton
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops.to_uint8 import DTYPES, OPERATOR, to_uint8, to_uint8_ref
from parity import backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 4, 1, 9), (2, 1, 8, 1), (1, 3, 37, 41), (2, 5, 16, 16)]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "channels_last slice": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "batch stride": lambda x: torch.stack([x, x], 1)[:, 1],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


def images(shape, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    return (0.8 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device_for(backend), dtype)


def assert_equal(got, want):
    assert got.dtype == torch.uint8 and got.is_contiguous()
    assert torch.equal(got, want)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, dtype, backend):
    x = images(shape, dtype, backend)
    assert_equal(to_uint8(x, backend), to_uint8_ref(x))


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, backend):
    x = LAYOUTS[layout](images((3, 3, 6, 10), torch.float32, backend))
    assert_equal(to_uint8(x, backend), to_uint8_ref(x.contiguous()))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_byte_boundary(dtype, backend):
    """One step of the floating type to either side of each integer: where a fused multiply-add would differ."""
    exact = (torch.arange(-2, 260, dtype=dtype) - 128) / 127.5
    lower, upper = (exact.nextafter(torch.tensor(s * torch.inf, dtype=dtype)) for s in (-1, 1))
    x = torch.cat([exact, lower, upper, lower.nextafter(lower - 1), upper.nextafter(upper + 1)])
    x = x.view(1, 1, 1, -1).to(device_for(backend))
    assert_equal(to_uint8(x, backend), to_uint8_ref(x))


@BACKENDS
def test_round_trip_and_special_values(backend):
    device = device_for(backend)
    every_byte = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(every_byte.permute(0, 3, 1, 2).float() / 127.5 - 1, backend), every_byte)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1.0, -1.0, 0.0], device=device)
    expected = [0, 255, 0, 255, 0, 255, 0, 128]
    assert to_uint8(special.view(1, 1, 1, -1), backend).flatten().tolist() == expected


@given(st.lists(st.floats(-1.25, 1.25, width=32), min_size=1, max_size=50))
def test_definition_is_edms_formula(values):
    x = np.asarray(values, dtype=np.float32)
    edm = (x * np.float32(127.5) + np.float32(128)).clip(0, 255).astype(np.uint8)
    assert to_uint8_ref(torch.from_numpy(x).view(1, 1, 1, -1)).flatten().tolist() == edm.tolist()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, backend):
    n, c, h, w = shape
    assert to_uint8(images(shape, torch.float32, backend), backend).shape == (n, h, w, c)


@BACKENDS
def test_carries_no_gradient(backend):
    x = images((1, 3, 4, 4), torch.float32, backend).requires_grad_()
    y = to_uint8(x, backend)
    assert not y.requires_grad
    assert torch.equal(y, to_uint8_ref(x.detach()))


@BACKENDS
def test_registration_and_compile(backend):
    for layout in ("contiguous", "channels_last", "rows apart"):
        x = LAYOUTS[layout](images((2, 3, 4, 5), torch.float32, backend))
        opcheck(torch.ops.gdd_fast.to_uint8.default, (x, backend))
    compiled = torch.compile(lambda x: to_uint8(x * 0.5, backend), fullgraph=True, backend="aot_eager")
    x = images((2, 3, 4, 5), torch.float32, backend)
    assert torch.equal(compiled(x), to_uint8_ref(x * 0.5))


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled = torch.compile(lambda x: to_uint8(x * 0.5), fullgraph=True)
    x = images((2, 3, 4, 5), torch.float32, "torch")
    assert torch.equal(compiled(x), to_uint8_ref(x * 0.5))


@pytest.mark.slow
@BACKENDS
def test_more_elements_than_32_bits_count(backend):
    if backend == "triton" and device_for(backend) == "cpu":
        pytest.skip("too slow in the interpreter")
    if backend == "torch":
        pytest.skip("the definition")
    x = torch.zeros((1, 1, 2**10 + 1, 2**21), dtype=torch.bfloat16, device=device_for(backend))
    x[..., -1, -1] = 1
    y = to_uint8(x, backend)
    assert y[0, -1, -1, 0] == 255 and y[0, -1, -2, 0] == 128 and y[0, 0, 0, 0] == 128


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(3, 4, 4), r"\(N, C, H, W\), not of shape \(3, 4, 4\)"), (torch.zeros(1, 3, 4, 4).int(), "int32")],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        to_uint8(x)


def test_backend_by_name_is_obeyed_or_refused():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(BackendError, match="no cuda implementation"):
        to_uint8(x, "cuda")
    with pytest.raises(BackendError, match="unknown backend 'numpy'"):
        to_uint8(x, "numpy")


def test_triton_kernel_compiles_for_ampere_and_hopper():
    strides = dict.fromkeys(("stride_n", "stride_c", "stride_p"), "i64")
    cases = [
        TritonCase(
            "to_uint8_kernel",
            {"x_ptr": x, "y_ptr": "*u8", **strides, "image_size": size, "blocks_per_image": "i32"},
            {"C": 3, "BLOCK": 1024},
            {"num_warps": 4, "enable_fp_fusion": False},
        )
        for x, size in (("*fp32", "i32"), ("*bf16", "i32"), ("*fp16", "i64"), ("*fp64", "i32"))
    ]
    for resources in compile_triton("gdd_fast.kernels.to_uint8", cases):
        resources.assert_no_spills()
        assert resources.registers <= 64, resources
