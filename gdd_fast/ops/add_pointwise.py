"""`y += W x` for every pixel: a 1x1 convolution that accumulates into a map, as a matrix product does by itself.

For inference: it writes to `y` and has no gradient. It spares the projections on a U-Net's skip paths a map of their
own and a pass to add it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.errors import InputError


def add_pointwise_ref(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The definition: the new value of `y`, which is left as it is."""
    return y + F.conv2d(x, weight)


def add_pointwise_(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the 1x1 convolution of `x` to `y`, in place.

    Args:
        y: (N, C', H, W), floating.
        x: (N, C, H, W), of the dtype of y.
        weight: (C', C, 1, 1), of the dtype of y.

    Where x and y are channels_last, this is one matrix product that accumulates into y; in other memory formats, a
    convolution and an addition.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    n, c, h, w = x.shape
    if weight.shape != (y.shape[1], c, 1, 1) or (y.shape[0], *y.shape[2:]) != (n, h, w):
        raise InputError(
            f"add_pointwise_: y {tuple(y.shape)}, x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    if not x.dtype == y.dtype == weight.dtype:
        raise InputError(
            f"add_pointwise_: y, x and weight must be of one dtype, not {y.dtype}, {x.dtype}, {weight.dtype}"
        )
    torch.ops.gdd_fast.add_pointwise_(y, x, weight)


torch.library.define("gdd_fast::add_pointwise_", "(Tensor(a!) y, Tensor x, Tensor weight) -> ()")


@torch.library.impl("gdd_fast::add_pointwise_", "CompositeExplicitAutograd")
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)):
        y.add_(F.conv2d(x, weight))
        return
    rows = _pixels(y)
    torch.addmm(rows, _pixels(x), weight.flatten(1).t(), out=rows)


@torch.library.register_fake("gdd_fast::add_pointwise_")
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


def _pixels(x: Tensor) -> Tensor:
    """(N * H * W, C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
