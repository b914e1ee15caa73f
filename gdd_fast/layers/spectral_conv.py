"""A spectrally normalised convolution (Miyato et al., arXiv 1802.05957) that divides its result, not its weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from gdd_fast.ops._memory_format import runs_eagerly

_MOST_PIXELS = 128
"""The most output pixels for which the result is computed as a matrix product."""


class SpectralConv2d(nn.Conv2d):
    """`spectral_norm(nn.Conv2d(...))`: same state_dict and buffers; its vectors start iterated or `random`.

    It computes in the dtype of its input, and takes the norm in the weight's.

    A convolution is linear, so W / sigma convolved with x is W convolved with x, over sigma. For few images the result
    is smaller than the weight, so in float32 on a CPU the result is divided: PyTorch's parametrization passes over the
    weight some twenty times, forward and backward, this one five times. Both are the same function and twice
    differentiable, except through the power iteration, which is constant in both.
    """

    divide_result = True
    """False: always as PyTorch's parametrization."""

    @classmethod
    def make(cls, *args: Any, random: bool = False, **kwargs: Any) -> nn.Module:
        """The module with its parametrization; arguments as for `nn.Conv2d`.

        `random` starts the power iteration from random vectors instead of ones that torch has iterated 15 times.
        """
        normed = spectral_norm(cls(*args, **kwargs))
        if random:
            for name, vector in normed.named_buffers():
                if name.endswith(("._u", "._v")):
                    vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        return normed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W') in x's dtype."""
        if self._divides_result(x):
            weight, rows, u, v, sigma = self._norm()
            if self._is_product(x, weight):
                y = _Product.apply(x, weight, u, v, sigma, self.stride, self.padding)
                return y if self.bias is None else y + self.bias[:, None, None]
            y = self._conv_forward(x, weight, None)
            factor = _Sigma.apply(rows, u, v, sigma).reciprocal()
            return y * factor if self.bias is None else torch.addcmul(self.bias[:, None, None], y, factor)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)

    def _is_product(self, x: Tensor, weight: Tensor) -> bool:
        size = [(s + 2 * p - k) // t + 1 for s, p, k, t in self._sizes(x)]
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        tiled = all(k % t == 0 and (s + 2 * p) % t == 0 for s, p, k, t in self._sizes(x))
        last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return plain and tiled and last and 0 < len(x) * size[0] * size[1] <= _MOST_PIXELS and runs_eagerly(x)

    def _divides_result(self, x: Tensor) -> bool:
        usual = x.is_cpu and x.dim() == 4 and not isinstance(self.padding, str) and not torch.is_autocast_enabled("cpu")
        if not (self.divide_result and usual and parametrize.is_parametrized(self, "weight")):
            return False
        weight: Tensor = self.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        rows, columns = ((s + 2 * p - k) // t + 1 for s, p, k, t in self._sizes(x))
        result = len(x) * self.out_channels * rows * columns
        return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64) and result <= 2 * weight.numel()

    def _sizes(self, x: Tensor):
        return zip(x.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)

    def _norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The weight, its rows (K, C * R * S) in memory order, and the constants u, v and u^T rows v.

        In training this does one power iteration and stores it in the buffers, whose v is in the order C, R, S.
        """
        norm: Any = self.parametrizations.weight[0]  # type: ignore[index,union-attr]
        weight: Tensor = self.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        window = weight.shape[1:]
        channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        rows = _rows(weight) if channels_last else weight.flatten(1)
        with torch.no_grad():
            u = norm._u.clone()
            v = norm._v.clone()  # backward must not keep the buffer itself, which the next iteration overwrites
            v = v.view(window).permute(1, 2, 0).flatten() if channels_last else v
            if not norm.training:
                return weight, rows, u, v, torch.dot(u, torch.mv(rows, v))
            for _ in range(norm.n_power_iterations):
                u = F.normalize(torch.mv(rows, v), dim=0, eps=norm.eps)
                product = torch.mv(rows.t(), u)
                v = F.normalize(product, dim=0, eps=norm.eps)
            norm._u.copy_(u)
            norm._v.copy_(v.view(*window[1:], window[0]).permute(2, 0, 1).flatten() if channels_last else v)
            return weight, rows, u, v, torch.dot(product, v)


class _Product(torch.autograd.Function):
    """A convolution of few pixels, over sigma, as a matrix product of their windows, in the weight's memory order.

    oneDNN would reorder the weight, and its gradient back, which takes as long as multiplying. The weight's gradient is
    one pass: sigma's part, an outer product, is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        windows, (n, height, width) = _windows(x, weight.shape[2:], stride, padding)
        y = (windows @ _rows(weight).t()).div_(sigma).view(n, height, width, -1).permute(0, 3, 1, 2)
        of_sigma = (u, v, y) if weight.requires_grad else (None,) * 3  # for sigma's derivative
        ctx.save_for_backward(x, weight, sigma, *of_sigma)
        ctx.geometry = stride, padding
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sigma, u, v, y = ctx.saved_tensors
        stride, padding = ctx.geometry
        for_x, for_weight = ctx.needs_input_grad[:2]
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # will be differentiated again: by the definition
            wanted = [t for t, needed in ((x, for_x), (weight, for_weight)) if needed]
            norm = torch.dot(u, torch.mv(_rows(weight), v)) if for_weight else sigma
            y = F.conv2d(x, weight, None, stride, padding) / norm
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return next(found) if for_x else None, next(found) if for_weight else None, *nothing
        dx = dweight = None
        above = (dy / sigma).permute(0, 2, 3, 1).reshape(-1, len(weight))
        if for_x:
            dx = _from_windows(above @ _rows(weight), x.shape, dy.shape[2:], weight.shape[2:], stride, padding)
        if for_weight:
            windows, _ = _windows(x, weight.shape[2:], stride, padding)
            product = above.t() @ windows
            dsigma = -torch.dot(above.flatten(), y.permute(0, 2, 3, 1).flatten())
            product.addr_(u * dsigma, v)
            dweight = product.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return dx, dweight, *nothing


def _rows(weight: Tensor) -> Tensor:
    """A channels_last weight (K, C, R, S) as (K, R * S * C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _windows(
    x: Tensor, window: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, tuple[int, int, int]]:
    """The window of channels_last x for each output pixel, (pixels, R * S * C), and the output's (N, H', W')."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = padded.unfold(1, window[0], stride[0]).unfold(2, window[1], stride[1])  # (N, H', W', C, R, S)
    n, height, width = seen.shape[:3]
    return seen.permute(0, 1, 2, 4, 5, 3).reshape(n * height * width, -1), (n, height, width)


def _from_windows(
    windows: Tensor,
    shape: Sequence[int],
    out: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The adjoint of `_windows`: each pixel of x, of `shape`, sums over the windows that contain it; channels_last.

    `out` is the number of windows per direction. Windows and the padded x consist of tiles of the stride's size, which
    are added as a whole.
    """
    n, channels, height, width = shape
    rows, columns = (k // t for k, t in zip(window, stride, strict=True))
    tiles = windows.view(n, *out, rows, stride[0], columns, stride[1], channels).transpose(4, 5)
    down, across = ((s + 2 * p) // t for s, p, t in zip(shape[2:], padding, stride, strict=True))
    sums = windows.new_zeros(n, down, stride[0], across, stride[1], channels)
    for row in range(rows):
        for column in range(columns):
            seen = tiles[:, :, :, row, column].transpose(2, 3)
            sums[:, row : row + out[0], :, column : column + out[1]] += seen
    inner = sums.view(n, down * stride[0], across * stride[1], channels)
    inner = inner[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inner.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class _Sigma(torch.autograd.Function):
    """u^T W v, whose value is known, as a function of W."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        return sigma.clone()

    @staticmethod
    def backward(ctx: Any, dsigma: Tensor) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        return torch.outer(u * dsigma, v), None, None, None
