"""pointwise: 1x1 convolutions as matrix products, as accurate as convolutions."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gdd_fast.errors import InputError
from gdd_fast.ops.pointwise import pointwise, pointwise_ref
from parity import assert_as_accurate_as_torch


def tensors(dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 12, 5, 3), (2, 7, 5, 3), (12, 7, 1, 1)
    y, x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [y.contiguous(memory_format=layout), x.contiguous(memory_format=layout), weight]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_convolution_is_as_accurate_as_torchs(dtype: torch.dtype, layout: torch.memory_format, biased: bool) -> None:
    _, x, weight = tensors(dtype, layout)
    bias = [torch.linspace(-3, 3, 12).to(dtype)] if biased else []
    y = pointwise(x, weight, *bias)
    assert y.is_contiguous(memory_format=layout)
    assert_as_accurate_as_torch(pointwise, pointwise_ref, [x, weight, *bias])
    pair = lambda function: lambda x, skip, weight, *bias: function((x, skip), weight, *bias)
    skip, weight = tensors(dtype, layout)[0], torch.linspace(-1, 1, 12 * 19).reshape(12, 19, 1, 1).to(dtype)
    assert_as_accurate_as_torch(pair(pointwise), pair(pointwise_ref), [x, skip, weight, *bias])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_under_autocast_as_torchs_convolutions(layout: torch.memory_format, paired: bool, biased: bool) -> None:
    """The type of the result, whatever those of the inputs, and the bits of inputs cast by hand; compiled as well."""
    skip, x, weight = tensors(torch.float32, layout)
    bias = torch.linspace(-3, 3, 12) if biased else None
    maps, weight = ((x, skip), weight.repeat(1, 3, 1, 1)[:, :19]) if paired else (x.bfloat16(), weight)
    cast = tuple(t.bfloat16() for t in maps) if paired else maps
    want = pointwise(cast, weight.bfloat16(), None if bias is None else bias.bfloat16())
    for function in (pointwise, torch.compile(pointwise, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            got = function(maps, weight, bias)
            assert got.dtype == pointwise_ref(maps, weight, bias).dtype == torch.bfloat16
        assert got.is_contiguous(memory_format=layout) and torch.equal(got, want)


def test_as_torch_library_knows_it() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        _, x, weight = tensors(torch.float32, layout)
        for bias in (None, torch.ones(12)):
            opcheck(torch.ops.gdd_fast.pointwise.default, (x, None, weight, bias))
            opcheck(torch.ops.gdd_fast.pointwise.default, (x, x + 1, torch.cat([weight, weight], 1), bias))


def test_what_does_not_fit() -> None:
    _, x, weight = tensors(torch.float32)
    for arguments in ((x, weight[:, :6]), (x, weight, weight), (x, weight.half()), (x[0], weight), ((x, x), weight)):
        with pytest.raises(InputError, match="pointwise: x"):
            pointwise(*arguments)
