"""The layers of a folded network: what is left of a U-Net at one noise level. `fold` makes them.

Weights are in the compute dtype and the target's layout from the start, nothing requires a gradient, and a layer may
overwrite activations that only it reads: a projection on a skip path accumulates into the branch that it ends.

A map is passed along with its statistics, for the norms that read it, if the operator that made the map computed them.
A fused residual does, which saves each such norm a pass over the map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.backend import Backend
from gdd_fast.layers.skip_pair import Pair, Statistics
from gdd_fast.ops.group_norm_silu import group_norm_silu
from gdd_fast.ops.pointwise import pointwise
from gdd_fast.ops.resample2d import resample2d
from gdd_fast.ops.residual import residual
from gdd_fast.ops.small_maps import MOST_PRODUCTS, panel_conv2d, panel_weight, small_resample2d
from gdd_fast.ops.winograd_conv2d import LEAST_TILES, takes, tiles, winograd_conv2d, winograd_weight

Convolve = Literal["plain", "packed", "traced"]
"""How convolutions run: by PyTorch; by oneDNN on weights in its own order (CPU); or, for a compiler, without writing in
place."""


@dataclass(frozen=True)
class Target:
    """Where a folded network runs, and by which implementations (see gdd_fast.backend), all able to run there.

    layout: memory format of images and weights, as `gdd_fast.device.fast_layout`.
    statistics: whether residuals compute statistics of their results, for norms that can use them.
    winograd: convolve by `winograd_conv2d` where it has a kernel and the maps are large enough.
    small: run small maps by the kernels of `gdd_fast.ops.small_maps`.
    late_bias: leave a convolution's bias to the next operator where that can add it, and run 1x1 convolutions by
    `pointwise`, in channels_last a matrix product that adds it. PyTorch's convolutions on a GPU add it in a separate
    pass.
    """

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    convolve: Convolve
    norm: Backend
    residual: Backend
    resample: Backend
    attention: Backend
    statistics: bool
    winograd: bool
    small: bool
    late_bias: bool

    @property
    def pointwise(self) -> bool:
        """Whether 1x1 convolutions run by `gdd_fast.ops.pointwise`, of pairs too."""
        return self.convolve == "plain" and self.late_bias


def memory_format(channels_last: bool) -> torch.memory_format:
    """A target's layout from what modules keep of it: pickle's protocol 2, used by torch.save, cannot write formats."""
    return torch.channels_last if channels_last else torch.contiguous_format


class PackedWeight:
    """A weight in the order that oneDNN's convolution reads, kept for the last input shape.

    The order depends on the processor, the threads and the shape. Unless the weight is packed, every call reorders it.
    A weight packed for another shape is worse: oneDNN then converts between blocked orders, for some pairs without fast
    code, and a whole network took four times as long (AVX2, two threads).
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[torch.Size, int], Tensor] | None = None

    def __call__(self, weight: Tensor, padding: int, shape: torch.Size) -> Tensor:
        key, last = (shape, torch.get_num_threads()), self._last  # read once: other threads may replace it
        if last is None or last[0] != key:
            geometry = [padding] * 2, [1, 1], [1, 1], 1
            last = key, torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(shape))
            self._last = last
        return last[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()  # oneDNN's order cannot be copied or pickled, and belongs to this processor


class WinogradWeight:
    """A 3x3 weight and its bias as `winograd_conv2d` reads them, made at the first call and kept.

    They take four times the memory of the float32 weight.
    """

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self._made is None:
            self._made = winograd_weight(weight), None if bias is None else bias.float()
        return self._made

    def __reduce__(self) -> tuple[Any, ...]:
        return WinogradWeight, ()  # the order belongs to this processor, as above


class PanelWeight:
    """The weights of a convolution and of those added to it as `panel_conv2d` reads them, made at the first call."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor] | None = None

    def __call__(self, convs: "list[Convolution]") -> tuple[Tensor, Tensor]:
        if self._made is None:
            bias = convs[0].weight.new_zeros(convs[0].weight.shape[0], dtype=torch.float32)
            for conv in convs:
                bias = bias if conv.bias is None else bias + conv.bias
            self._made = panel_weight([conv.weight for conv in convs]), bias
        return self._made

    def __reduce__(self) -> tuple[Any, ...]:
        return PanelWeight, ()  # the order belongs to this processor, as above


class Convolution(nn.Module):
    """A stride-1 convolution with constant weights. Takes a pair if it is 1x1 and the target has `pointwise`.

    Args:
        weight: (out, in, K, K), any floating dtype; cast once.
        bias: (out,) or None.
        padding: rows and columns of zeros around the image.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: int, target: Target) -> None:
        super().__init__()
        weight = weight.to(target.device, target.dtype, memory_format=target.layout)
        self.bias = None if bias is None else nn.Buffer(bias.to(target.device, target.dtype))
        self.padding = padding
        self.pointwise = target.pointwise and weight.shape[2:] == (1, 1) and not padding
        self.weight = nn.Buffer(weight)
        self.packed = PackedWeight() if target.convolve == "packed" else None
        self.winograd = WinogradWeight() if target.winograd and padding == 1 and takes(weight) else None
        fits = weight.shape[2:] in ((1, 1), (3, 3)) and padding <= 2
        self.panels = PanelWeight() if target.small and fits and not self.pointwise else None
        self.traced = target.convolve == "traced"

    def forward(
        self,
        x: Tensor | Pair,
        add: Tensor | None = None,
        scale: float = 1.0,
        parts: "Sequence[tuple[Convolution, Tensor]]" = (),
    ) -> Tensor:
        """The convolution, plus the convolutions of `parts`, plus `scale * add`."""
        if self.panels is not None and self._small(x.shape):  # type: ignore[union-attr]
            weight, bias = self.panels([self, *(conv for conv, _ in parts)])
            maps = [part for _, part in parts]
            return panel_conv2d(x, weight, bias, self.weight.shape[2], self.padding, parts=maps, add=add, scale=scale)  # type: ignore[arg-type]
        y = self._convolve(x)
        for conv, part in parts:
            y = conv.add_to(y, part)
        if add is None:
            return y
        return torch.add(y, add, alpha=scale) if self.traced else y.add_(add, alpha=scale)

    def _small(self, shape: torch.Size) -> bool:
        if self.winograd is not None and tiles(shape) >= LEAST_TILES:
            return False
        return shape[0] * shape[2] * shape[3] * self.weight.numel() <= MOST_PRODUCTS

    def _convolve(self, x: Tensor | Pair) -> Tensor:
        if self.pointwise:
            return pointwise(x, self.weight, self.bias)
        if self.winograd is not None and tiles(x.shape) >= LEAST_TILES:  # type: ignore[union-attr]
            return winograd_conv2d(x, *self.winograd(self.weight, self.bias))  # type: ignore[arg-type]
        if self.packed is None:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)  # type: ignore[arg-type]
        geometry = [self.padding] * 2, [1, 1], [1, 1], 1
        weight = self.packed(self.weight, self.padding, x.shape)  # type: ignore[union-attr]
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, "none", [], "")

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + self(x)`; with a packed weight, computed in place in `y`."""
        if self.panels is not None and self._small(x.shape):
            return self(x, y)
        if self.packed is not None:
            geometry = [self.padding] * 2, [1, 1], [1, 1], 1
            fused = torch.ops.mkldnn._convolution_pointwise_.binary
            weight = self.packed(self.weight, self.padding, x.shape)
            return fused(y, x, weight, self.bias, *geometry, "add", 1.0, None, [], None)
        return y + self(x)


class Norm(nn.Module):
    """`group_norm_silu` with constants."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        target: Target,
        *,
        silu: bool = True,
        add: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.to(target.device, torch.float32, copy=True))
        self.bias = nn.Buffer(bias.to(target.device, torch.float32, copy=True))
        self.add = None if add is None else nn.Buffer(add.to(target.device, torch.float32)[None])
        self.groups = groups
        self.eps = eps
        self.activation: Literal["silu"] | None = "silu" if silu else None
        self.backend = target.norm
        self.direct = target.norm == "cpp" and target.layout is torch.channels_last and target.convolve != "traced"

    def forward(
        self,
        x: Tensor | Pair,
        statistics: Statistics = None,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        add = self.add if add is None else add
        if self.direct:  # the operator's checks take longer than norming a map of 8x8 pixels
            first, skip = x if isinstance(x, tuple) else (x, None)
            first = first.contiguous(memory_format=torch.channels_last)
            skip = None if skip is None else skip.contiguous(memory_format=torch.channels_last)
            norm = torch.ops.gdd_fast_C.group_norm_silu.default
            constants = self.groups, self.weight, self.bias, self.eps
            return norm(first, skip, *constants, add, scale, shift, self.activation == "silu", True)[0]
        return group_norm_silu(
            x,
            self.groups,
            self.weight,
            self.bias,
            self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=self.activation,
            statistics=statistics,
            backend=self.backend,
        )


class Resampling(nn.Module):
    """Up- or downsampling R by two; given `add`, `(R(x) + add) * scale`."""

    def __init__(self, kernel: Tensor, *, up: bool, padding: int, box: bool, target: Target) -> None:
        super().__init__()
        self.kernel = nn.Buffer(kernel.to(target.device, torch.float32, copy=True))
        self.options: dict[str, Any] = {"up": up, "padding": padding, "box": box, "backend": target.resample}
        self.small = target.small
        self.channels_last = target.layout is torch.channels_last

    def forward(self, x: Tensor, add: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if self.small:
            up, padding = self.options["up"], self.options["padding"]
            return small_resample2d(x, self.kernel, up=up, padding=padding, add=add, scale=scale)
        y = resample2d(x, self.kernel, add=add, scale=scale, **self.options)
        if x.shape[2] * x.shape[3] > 1:
            return y
        # a map of one pixel does not say in which memory format the next ones are to be
        return y.contiguous(memory_format=memory_format(self.channels_last))


class FusedResidual(nn.Module):
    """`(h + x + bias) * scale` by the fused `residual`, with the result's statistics if a norm can use them."""

    def __init__(self, scale: float, bias: Tensor, target: Target) -> None:
        super().__init__()
        self.scale = scale
        self.bias = nn.Buffer(bias.to(target.device, torch.float32))
        self.backend = target.residual
        self.statistics = target.statistics

    def forward(self, conv: Convolution, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        summed: Any = residual(conv(h), x, self.bias, self.scale, statistics=self.statistics, backend=self.backend)
        return summed if self.statistics else (summed, None)


class Identity(nn.Module):
    """End of a residual branch whose skip path is the identity and whose convolution is already scaled: `conv(h) +
    scale * x`. With a fused residual, `FusedResidual` takes its place."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, conv: Convolution, h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return conv(h, x, self.scale), None


class Projection(nn.Module):
    """End of a residual branch whose skip path is a 1x1 convolution of a pair or a (perhaps downsampled) tensor.

    The scale of both paths is in their weights, and the projection's bias in that of the branch's last convolution.
    """

    def __init__(self, convs: list[Convolution], resample: Resampling | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.resample = resample

    def forward(self, conv: Convolution, h: Tensor, x: Tensor | Pair) -> tuple[Tensor, None]:
        if self.resample is not None:
            x = self.resample(x)
        parts = tuple(zip(self.convs, x if isinstance(x, tuple) else (x,), strict=True))
        return conv(h, parts=parts), None


class FusedProjection(nn.Module):
    """`Projection` into a map of its own, which a fused residual adds to the branch: this moves no more memory, adds
    both biases on the way and yields the result's statistics."""

    def __init__(self, conv: Convolution, resample: Resampling | None, add: FusedResidual) -> None:
        super().__init__()
        self.conv = conv
        self.resample = resample
        self.add = add

    def forward(self, conv: Convolution, h: Tensor, x: Tensor | Pair) -> tuple[Tensor, Tensor | None]:
        return self.add(conv, h, self.conv(x if self.resample is None else self.resample(x)))


class Resampled(nn.Module):
    """End of a residual branch whose skip path is resampled: `(R(x) + h) * scale`.

    A projection, if any, comes before upsampling: the result is the same at a quarter of the cost.
    """

    def __init__(self, resample: Resampling, conv: Convolution | None, scale: float) -> None:
        super().__init__()
        self.resample = resample
        self.conv = conv
        self.scale = scale

    def forward(self, conv: Convolution, h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        x = x if self.conv is None else self.conv(x)
        return self.resample(x, add=conv(h), scale=self.scale), None


class ConvolutionDown(nn.Module):
    """The residual encoder's path: `(R(conv(x)) + add) * scale`, with the convolution at the full resolution."""

    def __init__(self, conv: Convolution, resample: Resampling) -> None:
        super().__init__()
        self.conv = conv
        self.resample = resample

    def forward(self, x: Tensor, add: Tensor, scale: float) -> Tensor:
        return self.resample(self.conv(x), add=add, scale=scale)
