"""to_uint8 is EDM's conversion in every bit, whatever the layout, dtype and values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdd_fast.errors import InputError
from gdd_fast.ops.to_uint8 import DTYPES, to_uint8

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


def edm(x):
    """Its code, in numpy; of half types in float32."""
    wide = x.numpy() if x.dtype in (torch.float32, torch.float64) else x.float().numpy()
    return (wide * wide.dtype.type(127.5) + wide.dtype.type(128)).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_edms_formula_in_any_layout_and_type(layout, dtype):
    x = 0.8 * torch.randn((3, 3, 6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = LAYOUTS[layout](x.to(dtype))
    y = to_uint8(x)
    assert y.dtype == torch.uint8 and y.is_contiguous()
    assert np.array_equal(y.numpy(), edm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_byte_boundary(dtype):
    """One step of the floating type to either side of each integer: where a fused multiply-add would differ."""
    exact = (torch.arange(-2, 260, dtype=dtype) - 128) / 127.5
    lower, upper = (exact.nextafter(torch.tensor(s * torch.inf, dtype=dtype)) for s in (-1, 1))
    x = torch.cat([exact, lower, upper, lower.nextafter(lower - 1), upper.nextafter(upper + 1)]).view(1, 1, 1, -1)
    assert np.array_equal(to_uint8(x).numpy(), edm(x))


def test_round_trip_and_special_values():
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(every_byte.permute(0, 3, 1, 2).float() / 127.5 - 1), every_byte)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1.0, -1.0, 0.0])
    assert to_uint8(special.view(1, 1, 1, -1)).flatten().tolist() == [0, 255, 0, 255, 0, 255, 0, 128]


@given(st.lists(st.floats(-1.25, 1.25, width=32), min_size=1, max_size=50))
def test_any_values(values):
    x = torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)
    assert np.array_equal(to_uint8(x).numpy(), edm(x))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    n, c, h, w = shape
    assert to_uint8(torch.zeros(shape)).shape == (n, h, w, c)


def test_no_gradient_and_one_graph():
    x = torch.rand(2, 3, 4, 5).requires_grad_()
    assert not to_uint8(x).requires_grad
    compiled = torch.compile(lambda x: to_uint8(x * 0.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), to_uint8(x * 0.5))


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(3, 4, 4), r"\(N, C, H, W\), not of shape \(3, 4, 4\)"), (torch.zeros(1, 3, 4, 4).int(), "int32")],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        to_uint8(x)
