"""The comparison rule lets through what is as accurate as eager PyTorch, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from parity import assert_as_accurate_as_torch

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class Silu(torch.autograd.Function):
    """SiLU with a hand-written backward that is right only for the gradients `read` reads properly."""

    read = staticmethod(lambda dy: dy)

    @classmethod
    def forward(cls, ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @classmethod
    def backward(cls, ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x.float())
        return (cls.read(dy).float() * s * (1 + x.float() * (1 - s))).to(x.dtype)


class TakesGradientsForDense(Silu):
    """The mistake of a kernel that walks a pointer: it ignores the strides of the incoming gradient."""

    read = staticmethod(lambda dy: dy.as_strided(dy.shape, torch.empty(dy.shape).stride()))


@DTYPES
def test_accepts_an_accurate_function_and_gradient(dtype):
    x = X.to(dtype).requires_grad_()
    assert_as_accurate_as_torch(lambda x: F.silu(x.float()).to(x.dtype), F.silu, [x])
    assert_as_accurate_as_torch(Silu.apply, F.silu, [x])


@DTYPES
def test_refuses_an_inaccurate_output(dtype):
    worse = 1 + 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="output 0: error"):
        assert_as_accurate_as_torch(lambda x: F.silu(x) * worse, F.silu, [X.to(dtype)])


def test_refuses_a_wrong_gradient_of_any_input():
    x, b = X.clone().requires_grad_(), X[0].clone().requires_grad_()
    with pytest.raises(AssertionError, match="gradient of input 1"):
        assert_as_accurate_as_torch(lambda x, b: x + 2 * b - b.detach(), lambda x, b: x + b, [x, b])


def test_gradients_arrive_non_dense():
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_as_accurate_as_torch(TakesGradientsForDense.apply, F.silu, [X.clone().requires_grad_()])


def test_refuses_another_shape_or_dtype_and_nan():
    with pytest.raises(AssertionError, match="instead of"):
        assert_as_accurate_as_torch(lambda x: x.double(), lambda x: x, [X])
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate_as_torch(lambda x: x / 0, lambda x: x, [X])
