"""What operators on feature maps share: one rule for the memory format of results, the types that are computed in."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gdd_fast.backend import has_extension
from gdd_fast.ops._memory_format import autocast_dtype, compute_dtype, memory_format
from gdd_fast.ops.attention import attention
from gdd_fast.ops.frozen_conv2d import frozen_conv2d
from gdd_fast.ops.frozen_conv2d_relu import frozen_conv2d_relu
from gdd_fast.ops.group_norm_silu import group_norm_silu
from gdd_fast.ops.group_norm_silu.definition import layout_of
from gdd_fast.ops.max_pool2x2 import max_pool2x2
from gdd_fast.ops.relu_bits import relu_bits
from gdd_fast.ops.resample2d import resample2d

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
SHAPES = [
    (2, 6, 4, 3),
    (1, 6, 4, 3),
    (2, 1, 4, 3),
    (1, 1, 4, 3),
    (2, 6, 1, 3),
    (2, 6, 4, 1),
    (2, 6, 1, 1),
    (1, 6, 1, 1),
]
# strides that neither `contiguous` gives, and the memory format of results
STRANGE = {
    "slice of channels_last channels": (torch.empty(2, 8, 4, 3).to(memory_format=CHANNELS_LAST)[:, 2:6], CHANNELS_LAST),
    "slice of contiguous channels": (torch.empty(2, 8, 4, 3)[:, 2:6], CONTIGUOUS),
    "one pixel of a channels_last map": (
        torch.empty(2, 6, 4, 3).to(memory_format=CHANNELS_LAST)[:, :, :1, :1],
        CHANNELS_LAST,
    ),
    "one pixel of a contiguous map": (torch.empty(2, 6, 4, 3)[:, :, :1, :1], CONTIGUOUS),
    "a row as a map of one pixel": (torch.empty(2, 6)[:, :, None, None], CONTIGUOUS),
    "tokens as a column of pixels": (torch.empty(2, 5, 6).mT[..., None], CHANNELS_LAST),
    "one pixel for all": (torch.empty(2, 6, 1, 1).expand(2, 6, 4, 3), CHANNELS_LAST),
    "columns innermost": (torch.empty(2, 6, 4, 3).mT.contiguous().mT, CONTIGUOUS),
}


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_format_is_torchs_of_dense_maps(shape, layout):
    """Also where one channel or one pixel makes both formats the same memory."""
    x = torch.empty(shape, memory_format=layout)
    same = x.stride() == torch.empty(shape).stride()  # one channel and one pixel: nothing tells them apart
    assert memory_format(x) is (CONTIGUOUS if same else layout)
    # torch's own decision, seen in what a convolution returns
    y = torch.nn.functional.conv2d(x, torch.ones(2, shape[1], 1, 1))
    assert y.stride() == torch.empty(y.shape, memory_format=memory_format(x)).stride()


@pytest.mark.parametrize("name", STRANGE)
def test_memory_format_of_other_strides(name):
    x, want = STRANGE[name]
    assert memory_format(x) is want


OPERATORS = {
    "group_norm_silu": lambda x: group_norm_silu(x, 2, torch.ones(x.shape[1]), torch.zeros(x.shape[1])),
    "group_norm_silu, torch": lambda x: group_norm_silu(
        x, 2, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), backend="torch"
    ),
    "frozen_conv2d": lambda x: frozen_conv2d(x, torch.ones(x.shape[1], 1, 1, 1), groups=x.shape[1]),
    "frozen_conv2d_relu": lambda x: frozen_conv2d_relu(x, torch.ones(x.shape[1], 1, 1, 1), groups=x.shape[1]),
    "attention": lambda x: attention(x, 2, "blocks"),
    "resample2d": lambda x: resample2d(x, torch.full((1, 1, 2, 2), 0.25), up=True, padding=0),
}


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 6, 4, 3), (2, 6, 1, 1), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_on_the_format_of_results_and_gradients(name, shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    x = x.as_strided(shape, torch.empty(shape, memory_format=layout).stride()).requires_grad_()
    y = OPERATORS[name](x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=layout)
    # attention's gradient is put together by PyTorch's autograd
    assert dx.is_contiguous(memory_format=layout) or name == "attention"


@pytest.mark.parametrize("python", [False, True], ids=["extension", "python"])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_of_a_frozen_convolution_are_torchs(shape, layout, python, monkeypatch):
    """Those of the result and of the gradient, at every kind of ambiguous shape."""
    if python:
        monkeypatch.setattr("gdd_fast.ops.frozen_conv2d.extension", lambda: None)
    elif not has_extension():
        pytest.skip("the extension gdd_fast._C is not built")
    x = torch.randn(shape).as_strided(shape, torch.empty(shape, memory_format=layout).stride()).requires_grad_()
    weight = torch.randn(4, shape[1], 1, 1)
    got, want = frozen_conv2d(x, weight), torch.nn.functional.conv2d(x, weight)
    assert got.stride() == want.stride()
    (dx,), (want_dx,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
    torch.testing.assert_close(dx, want_dx, rtol=1e-5, atol=1e-4)  # few pixels in channels_last are a matrix product
    assert dx.stride() == want_dx.stride()


def test_bits_follow_the_format_of_one_pixel():
    for layout in (CHANNELS_LAST, CONTIGUOUS):
        x = torch.tensor([-1.0, 1, 2]).view(1, 3, 1, 1).as_strided((1, 3, 1, 1), (3, 1, 3, 3))
        x = x.contiguous(memory_format=layout).requires_grad_()
        (dx,) = torch.autograd.grad(relu_bits(x).sum(), x)
        assert dx.flatten().tolist() == [0, 1, 1]


def test_types_that_are_computed_in():
    x = {dtype: torch.empty(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    assert [compute_dtype(t) for t in x.values()] == [*[torch.float32] * 3, torch.float64]
    assert [autocast_dtype(t) for t in x.values()] == list(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert [autocast_dtype(t) for t in x.values()] == [*[torch.bfloat16] * 3, torch.float64]


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("channels", [1, 6])
def test_a_pool_keeps_the_format(channels, layout):
    x = torch.randn(2, channels, 4, 6).contiguous(memory_format=layout)
    x = x.as_strided(x.shape, torch.empty(x.shape, memory_format=layout).stride()).requires_grad_()
    y = max_pool2x2(x)
    assert y.stride() == torch.empty(y.shape, memory_format=layout).stride()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.stride() == x.stride()


def test_the_definition_of_the_norm_goes_contiguous_where_pytorchs_kernels_have_to():
    x = torch.empty((2, 6, 4, 3), memory_format=CHANNELS_LAST)
    assert layout_of(x) is CHANNELS_LAST
    assert layout_of(x.to("meta")) is CONTIGUOUS  # as on a GPU


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_go_through_every_operator(name):
    """On the CPU too, where autograd is left to C++ for ordinary tensors."""
    with FakeTensorMode():
        x = torch.randn(2, 6, 4, 4).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
        y = OPERATORS[name](x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert isinstance(y, FakeTensor) and dx.shape == x.shape
