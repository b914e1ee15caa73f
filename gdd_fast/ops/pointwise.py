"""`W x + b` for every pixel: a 1x1 convolution as the matrix product that it is in channels_last.

For inference: without gradients. A product adds its bias, or the other half of a pair, on the way, while libraries'
convolutions on a GPU take a separate pass over the map. Under autocast it computes in autocast's dtype, as torch's
convolution does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Operator
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import autocast_dtype, cast, memory_format

OPERATOR = Operator("pointwise", fused=frozenset())  # matrix products, which PyTorch has for every device

Pair = tuple[Tensor, Tensor]


def pointwise_ref(x: Tensor | Pair, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition; arguments as for `pointwise`."""
    return F.conv2d(torch.cat(x, 1) if isinstance(x, tuple) else x, weight, bias)


def pointwise(x: Tensor | Pair, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of `x` (N, C, H, W) with `weight` (C', C, 1, 1) and `bias` (C',), all of one floating dtype.

    Under autocast, dtypes may differ: all are cast to autocast's, which is also the result's.

    A pair (x, skip) stands for `torch.cat([x, skip], 1)`, which is never built. If all maps are channels_last, each
    takes a matrix product, the second of which adds to the first, and the result is channels_last; in other memory
    formats these are convolutions, and the result is contiguous.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    first, skip = x if isinstance(x, tuple) else (x, None)
    maps = [first] if skip is None else [first, skip]
    fits = all(t.dim() == 4 and (t.shape[0], *t.shape[2:]) == (first.shape[0], *first.shape[2:]) for t in maps)
    fits = fits and weight.dim() == 4 and weight.shape[1:] == (sum(t.shape[1] for t in maps), 1, 1)
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (*maps, weight, bias) if t is not None)
        raise InputError(f"pointwise: x, weight and bias do not fit: {shapes}")
    given = [None if t is None else _as_convolved(t) for t in (first, skip, weight, bias)]
    dtypes = {t.dtype for t in given if t is not None}
    if len(dtypes) > 1:
        raise InputError(f"pointwise: x, weight and bias must be of one dtype, not {', '.join(map(str, dtypes))}")
    return torch.ops.gdd_fast.pointwise(*given)


torch.library.define("gdd_fast::pointwise", "(Tensor x, Tensor? skip, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("gdd_fast::pointwise", "CompositeExplicitAutograd")
def _(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    if not _channels_last(x, skip):
        y = F.conv2d(x, weight[:, :c], bias)
        return (y if skip is None else y.add_(F.conv2d(skip, weight[:, c:]))).contiguous()
    weight = weight.flatten(1)
    rows = F.linear(_pixels(x), weight[:, :c], bias)
    if skip is not None:
        torch.addmm(rows, _pixels(skip), weight[:, c:].t(), out=rows)
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


@torch.library.register_fake("gdd_fast::pointwise")
def _(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    if not _channels_last(x, skip):
        return x.new_empty((n, weight.shape[0], h, w))
    return x.new_empty((n, h, w, weight.shape[0])).permute(0, 3, 1, 2)


def _channels_last(*maps: Tensor | None) -> bool:
    """Dense and channels_last, by strides where both formats are the same memory."""
    last = torch.channels_last
    return all(t is None or (t.is_contiguous(memory_format=last) and memory_format(t) is last) for t in maps)


def _as_convolved(t: Tensor) -> Tensor:
    """t in autocast's dtype if autocast is on."""
    return cast(t, autocast_dtype(t))


def _pixels(x: Tensor) -> Tensor:
    """(N * H * W, C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
