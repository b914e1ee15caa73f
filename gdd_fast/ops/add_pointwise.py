"""`W x + b` for every pixel, and `y += W x`: 1x1 convolutions as the matrix products that they are in channels_last.

For inference: without gradients. A product adds its bias, or what is in `y`, on the way, where libraries' convolutions
on a GPU take a pass over the map for that. Under autocast they compute in its type, as torch's convolutions do.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Operator
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import autocast_dtype, cast

OPERATOR = Operator("add_pointwise", fused=frozenset())  # one matrix product, which PyTorch has for every device

Pair = tuple[Tensor, Tensor]


def pointwise_ref(x: Tensor | Pair, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition; arguments as of `pointwise`."""
    return F.conv2d(torch.cat(x, 1) if isinstance(x, tuple) else x, weight, bias)


def pointwise(x: Tensor | Pair, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of `x` (N, C, H, W) with `weight` (C', C, 1, 1) and `bias` (C',), all of one floating dtype.

    Under autocast they may be of several, and are cast to autocast's, which is the result's.

    A pair (x, skip) stands for `torch.cat([x, skip], 1)`, which is not built. Where all maps are channels_last, this is
    a matrix product for each, the second added to the first by itself, and the result is channels_last; in other memory
    formats, convolutions, and the result is contiguous.

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
    convolution and an addition. Under autocast x and weight are cast to its type, and y keeps its own: where that is
    another one, this is a convolution and an addition too.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    n, c, h, w = x.shape
    if weight.shape != (y.shape[1], c, 1, 1) or (y.shape[0], *y.shape[2:]) != (n, h, w):
        raise InputError(
            f"add_pointwise_: y {tuple(y.shape)}, x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    x, weight = _as_convolved(x), _as_convolved(weight)
    if not x.dtype == autocast_dtype(y) == weight.dtype:
        raise InputError(
            f"add_pointwise_: y, x and weight must be of one dtype, not {y.dtype}, {x.dtype}, {weight.dtype}"
        )
    torch.ops.gdd_fast.add_pointwise_(y, x, weight)


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
    return all(t is None or t.is_contiguous(memory_format=torch.channels_last) for t in maps)


torch.library.define("gdd_fast::add_pointwise_", "(Tensor(a!) y, Tensor x, Tensor weight) -> ()")


@torch.library.impl("gdd_fast::add_pointwise_", "CompositeExplicitAutograd")
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    if x.dtype != y.dtype or not _channels_last(x, y):
        y.add_(F.conv2d(x, weight))
        return
    rows = _pixels(y)
    torch.addmm(rows, _pixels(x), weight.flatten(1).t(), out=rows)


@torch.library.register_fake("gdd_fast::add_pointwise_")
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


def _as_convolved(t: Tensor) -> Tensor:
    """t in autocast's type where that is on."""
    return cast(t, autocast_dtype(t))


def _pixels(x: Tensor) -> Tensor:
    """(N * H * W, C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
