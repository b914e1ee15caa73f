"""act((1 + scale) * GN(x + add; weight, bias) + shift) and its gradient in Triton, over one tensor or a pair of them.

A program owns whole groups of one sample (see _tiles.py) and addresses every tensor by the strides of sample, channel
and pixel, so contiguous and channels_last memory and slices of either are read in place. A pair (x, skip) is the
concatenation of their channels: a block of channels reads the part in x, then the part in skip.

If samples and blocks alone fill the device, one kernel does all: it walks over its pixels once for the statistics and
again, from cache, to apply them. Otherwise pixels are split over programs, and the statistics (or the sums that the
gradient needs) of each part come from an earlier kernel. No atomics: results repeat to the bit.

The kernels are in _group_norm_forward.py and _group_norm_backward.py. Counts of programs and parts say nothing about
alignment, so kernels are not specialised on them (do_not_specialize).
"""

import torch
from torch import Tensor

from ._group_norm_backward import backward_kernel, backward_sums_kernel
from ._group_norm_forward import forward_kernel, statistics_kernel
from ._launch import configuration, launch, on_its_device, pixel_stride, programs_wanted, workspace
from ._tiles import MOST_PARTS, Tile, ceil_div, power_of_2, split, tile

_WIDEST = 128
"""Channels per block up to which the backward kernels keep the usual tile size. With more, per-channel values take the
registers that the tile needs, and they spill."""


class Partition:
    """How one call is partitioned: the tile, and the parts into which pixels are split."""

    def __init__(self, kind: str, x: Tensor, channels: int, groups: int) -> None:
        n, _, h, w = x.shape
        self.pixels = h * w
        options = dict(configuration(f"group_norm_silu.{kind}", x.device, (n, channels, self.pixels)))
        elements = options.pop("elements")
        cut = channels, channels // groups, self.pixels, x.stride(1) == 1
        self.tile: Tile = tile(*cut, elements)
        if kind == "backward" and self.tile.block_c > _WIDEST:
            self.tile = tile(*cut, elements // 2)
        self.options = options
        self.blocks = n * self.tile.blocks
        self.parts, self.chunk = split(self.blocks, self.pixels, self.tile.block_s, programs_wanted(x.device))

    @property
    def cut(self) -> dict[str, int]:
        """Arguments of a kernel whose pixels go to `parts` programs of `chunk` each."""
        return {"parts": self.parts, "chunk": self.chunk, "blocks": self.tile.blocks}

    @property
    def whole(self) -> dict[str, int]:
        """Arguments of a kernel whose programs take all pixels of a sample."""
        return {"parts": 1, "chunk": self.pixels, "blocks": self.tile.blocks}

    def constants(self, group: int) -> dict[str, int]:
        t = self.tile
        return {"GROUP": group, "CHANNELS": t.channels, "BLOCK_C": t.block_c, "BLOCK_S": t.block_s, **self.options}


@on_its_device
def statistics(x: Tensor, parts: int) -> Tensor:
    """The statistics (see _channels.py) of x (N, C, H, W), whose pixels are evenly spaced, over `parts` runs."""
    n, c, h, w = x.shape
    options = dict(configuration("group_norm_silu.forward", x.device, (n, c, h * w)))
    t = tile(c, 1, h * w, x.stride(1) == 1, options.pop("elements"))
    out = workspace((n, parts, 2, c), x.device)
    launch(statistics_kernel, (n * t.blocks * parts,),
        x, out, *_strides(x), c, h * w, parts, ceil_div(h * w, parts), t.blocks,
        CHANNELS=t.channels, BLOCK_C=t.block_c, BLOCK_S=t.block_s, **options,
    )  # fmt: skip
    return out


@on_its_device
def forward(
    x: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_statistics: Tensor | None,
    skip_statistics: Tensor | None,
    silu: bool,
    y: Tensor,
    statistics_parts: int,
) -> tuple[Tensor, Tensor]:
    """Fill y (N, C, H, W) and return mean and rstd, float32 (N, groups).

    Pixels of x, skip and y are evenly spaced; rows of add, scale and shift are contiguous. Missing statistics that
    cannot be computed on the way are taken over `statistics_parts` runs of pixels.
    """
    n, c = y.shape[:2]
    mean, rstd = (torch.empty((n, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    partition = Partition("forward", x, c, num_groups)
    if partition.parts > 1:
        if x_statistics is None:
            x_statistics = statistics(x, statistics_parts)
        if skip is not None and skip_statistics is None:
            skip_statistics = statistics(skip, statistics_parts)
    elif x_statistics is None:
        skip_statistics = None  # not worth compiling a kernel for statistics of the skip alone
    x_parts = 0 if x_statistics is None else x_statistics.shape[1]
    skip_parts = 0 if skip_statistics is None else skip_statistics.shape[1]
    launch(forward_kernel, (partition.blocks * partition.parts,),
        x, skip, x_statistics, skip_statistics, add, weight, bias, scale, shift, y, mean, rstd,
        *_strides(x), *_strides(skip), *_strides(y), _row_stride(add), _row_stride(scale), _row_stride(shift),
        C=c, C1=x.shape[1], S=partition.pixels, eps=eps, **partition.cut, x_parts=x_parts, skip_parts=skip_parts,
        BLOCK_G=partition.tile.block_g, X_PARTS=_room(x_parts), SKIP_PARTS=_room(skip_parts), SILU=silu,
        **partition.constants(c // num_groups),
    )  # fmt: skip
    return mean, rstd


@on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    dx: Tensor | None,
    dskip: Tensor | None,
    dadd: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    """Fill the gradients given. All but dx and dskip are (N, C), dweight and dbias still to be summed over N."""
    n, c = dy.shape[:2]
    group = c // mean.shape[1]
    partition = Partition("backward", x, c, mean.shape[1])
    sources = (x, skip, dy, mean, rstd, add, weight, bias, scale, shift)
    strides = (*_strides(x), *_strides(skip), *_strides(dy))
    row_strides = (_row_stride(add), _row_stride(scale), _row_stride(shift))
    number = 2 if dadd is None else 3
    sums = None
    if partition.parts > 1:
        sums = workspace((n, partition.parts, number, c), x.device)
        launch(backward_sums_kernel, (partition.blocks * partition.parts,),
            *sources, sums, *strides, *row_strides, c, x.shape[1], partition.pixels, **partition.cut,
            SUMS=number, SILU=silu, **partition.constants(group),
        )  # fmt: skip
    cut = partition.whole if dx is None and dskip is None else partition.cut
    launch(backward_kernel, (partition.blocks * cut["parts"],),
        *sources, sums, dx, dskip, dadd, dweight, dbias, dscale, dshift,
        *strides, *_strides(dx), *_strides(dskip), *row_strides, C=c, C1=x.shape[1], S=partition.pixels, **cut,
        sum_parts=partition.parts, BLOCK_G=partition.tile.block_g, SUM_PARTS=0 if sums is None else MOST_PARTS,
        SUMS=number, SILU=silu, **partition.constants(group),
    )  # fmt: skip


def _room(parts: int) -> int:
    """Room for `parts` statistics: the same for all of residual and `statistics`, so that one kernel fits all."""
    return parts and max(power_of_2(parts), 16)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of sample, channel and pixel."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), pixel_stride(x))


def _row_stride(row: Tensor | None) -> int:
    """The stride of samples; 0 if one row serves all samples."""
    return 0 if row is None or row.shape[0] == 1 else row.stride(0)
