"""cudnn-frontend's group norm of channels_last maps: kernels for sm_100, from 1.32 on, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.operator_case import package

CAPABILITY = (10, 0)


def cudnn_group_norm(groups: int, eps: float, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x (N, C, H, W), weight, bias (C,)) -> the norm of x, differentiable. Weight and bias are cast to x's type, which
    the package asks for.

    Raises UnavailableError without the package, or on a GPU that its kernels are not for.
    """
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UnavailableError("cudnn-frontend's norms are for sm_100 and later")
    fprop, bprop = package("cudnn.norm.fprop.api").norm_fprop, package("cudnn.norm.bprop.api").norm_bprop
    variant = package("cudnn.norm").NormVariant.GROUP_NORM

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, mean, rstd = fprop(variant, x, weight, bias, eps=eps, num_groups=groups)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, mean, rstd = ctx.saved_tensors
            dx, dweight, dbias = bprop(variant, dy, x, weight, mean, rstd, num_groups=groups)
            return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return lambda x, weight, bias: Norm.apply(x, weight.to(x.dtype), bias.to(x.dtype))
