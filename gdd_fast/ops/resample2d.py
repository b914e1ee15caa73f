"""Doubling or halving the resolution with a short filter, as EDM's U-Nets do: `(R(x) + add) * scale` in one pass.

For a filter k of K x K taps (K even) on the grid of the larger image and a border of p zeros around that image,

    down:  R(x)[u, v] = sum over a, b of k[a, b] x[2 u + a - p, 2 v + b - p]
    up:    R(x)[u, v] = 4 times the sum of k[a, b] x[i, j] over all i, j, a, b with 2 i + a - p = u, 2 j + b - p = v

Upsampling is 4 times the transpose of downsampling, so each is the other's gradient, to any order, and nothing of an
image's size is saved for it. In plain PyTorch these are depthwise convolutions with one copy of k per channel. EDM:
Karras et al., arXiv 2206.00364; filters [1, 1] and [1, 3, 3, 1].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import DTYPES, memory_format, runs_eagerly

OPERATOR = Operator("resample2d", fused=frozenset({"cuda"}))
_choose = chooser(OPERATOR)


def resample2d_ref(
    x: Tensor,
    kernel: Tensor,
    *,
    up: bool,
    padding: int,
    add: Tensor | None = None,
    scale: float = 1.0,
    box: bool = False,
) -> Tensor:
    """The definition, by depthwise convolutions; arguments as for `resample2d`."""
    size = _size(x, kernel, up, padding)
    return _ref(x, kernel, add, up, padding, size, 4.0 if up else 1.0, scale, box)


def resample2d(
    x: Tensor,
    kernel: Tensor,
    *,
    up: bool,
    padding: int,
    add: Tensor | None = None,
    scale: float = 1.0,
    box: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Filter each channel and double (`up`) or halve the resolution: `(R(x) + add) * scale`, rounded once.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64. Contiguous and channels_last memory, and slices of
            either along the batch or the channels, are read in place; anything else is copied once first.
        kernel: (1, 1, K, K), the normalised filter, floating, not requiring gradients. K is even.
        up: double the resolution instead of halving it.
        padding: width p of the border of zeros, in pixels of the larger image; K / 2 - 1 doubles or halves exactly.
        add: like the result; copied first if its memory format differs.
        scale: factor for the sum.
        box: states that `kernel` averages 2 x 2 pixels, which the definition then computes without a convolution.
        backend: "auto", "torch" or "cuda"; see gdd_fast.backend.

    Returns:
        (N, C, 2 (H - 1) + K - 2 p, ...) or (N, C, (H + 2 p - K) // 2 + 1, ...) in the dtype and memory format of x.
        Differentiable in x and add, any number of times.

    Raises:
        InputError: shapes or dtypes that do not fit, an image smaller than the filter, a trainable filter.
        BackendError: the requested backend cannot run here.
    """
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise InputError(f"resample2d: x must be (N, C, H, W) and floating, not {x.dtype} {tuple(x.shape)}")
    k = kernel.shape[-1]
    if kernel.shape != (1, 1, k, k) or k % 2 or k == 0 or not 0 <= padding < k:
        raise InputError(
            f"resample2d: the filter must be (1, 1, K, K) with K even and the padding in [0, K), "
            f"not {tuple(kernel.shape)} with padding {padding}"
        )
    if not kernel.is_floating_point() or kernel.requires_grad:
        raise InputError("resample2d: the filter must be floating and without gradient: pass filter.detach()")
    if box and (k != 2 or padding):
        raise InputError("resample2d: box is for a filter of 2 x 2 taps without padding")
    height, width = size = _size(x, kernel, up, padding)
    if min(size) < 0 or (min(size) == 0 and min(x.shape[2:]) > 0):
        raise InputError(f"resample2d: {tuple(x.shape)} is smaller than the filter's {k} pixels")
    if add is not None and (add.shape != (*x.shape[:2], *size) or add.dtype != x.dtype):
        raise InputError(
            f"resample2d: add must be {x.dtype} {(*x.shape[:2], *size)} like the result, not {add.dtype} "
            f"{tuple(add.shape)}"
        )
    for name, t in (("the filter", kernel), ("add", add)):
        if t is not None and t.device != x.device:
            raise InputError(f"resample2d: {name} is on {t.device}, x on {x.device}")
    implementation = _choose(backend, x.device.type)
    arguments = (x, kernel, add, up, padding, height, width, 4.0 if up else 1.0, scale, box, implementation)
    recorded = torch.is_grad_enabled() and (x.requires_grad or (add is not None and add.requires_grad))
    if not recorded and runs_eagerly(x):
        return _resample2d(*arguments)  # skip torch.library's autograd, which takes longer than a small map
    return torch.ops.gdd_fast.resample2d.default(*arguments)


torch.library.define(
    "gdd_fast::resample2d",
    "(Tensor x, Tensor kernel, Tensor? add, bool up, int padding, SymInt height, SymInt width, float gain, "
    "float scale, bool box, str implementation) -> Tensor",
)


def _resample2d(
    x: Tensor,
    kernel: Tensor,
    add: Tensor | None,
    up: bool,
    padding: int,
    height: int,
    width: int,
    gain: float,
    scale: float,
    box: bool,
    implementation: str,
) -> Tensor:
    layout = memory_format(x)
    if implementation == "torch":
        y = _ref(x, kernel, add, up, padding, (height, width), gain, scale, box)
        return y.contiguous(memory_format=layout)
    dense = 1 if layout == torch.channels_last else 3
    if x.stride(dense) != 1:
        x = x.contiguous(memory_format=layout)
    if add is not None:
        add = add.contiguous(memory_format=layout)
    channels_last = layout == torch.channels_last
    return torch.ops.gdd_fast_C.resample2d(x, kernel, add, up, padding, height, width, gain, scale, channels_last)


torch.library.impl("gdd_fast::resample2d", "CompositeExplicitAutograd")(_resample2d)


@torch.library.register_fake("gdd_fast::resample2d")
def _(x, kernel, add, up, padding, height, width, gain, scale, box, implementation) -> Tensor:
    return torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _setup_context(ctx, inputs, output) -> None:
    x, kernel, _, *options = inputs
    ctx.save_for_backward(kernel)
    ctx.size = x.shape[2:]
    ctx.options = options


def _backward(ctx, dy: Tensor):
    (kernel,) = ctx.saved_tensors
    up, padding, _, _, gain, scale, box, implementation = ctx.options
    dx = dadd = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.gdd_fast.resample2d(
            dy, kernel, None, not up, padding, *ctx.size, gain, scale, box, implementation
        )
    if ctx.needs_input_grad[2]:
        dadd = dy if scale == 1 else dy * scale
    return (dx, None, dadd, *[None] * 8)


torch.library.register_autograd("gdd_fast::resample2d", _backward, setup_context=_setup_context)


def _size(x: Tensor, kernel: Tensor, up: bool, padding: int) -> tuple[int, int]:
    k = kernel.shape[-1]
    if up:
        return 2 * (x.shape[2] - 1) + k - 2 * padding, 2 * (x.shape[3] - 1) + k - 2 * padding
    return (x.shape[2] + 2 * padding - k) // 2 + 1, (x.shape[3] + 2 * padding - k) // 2 + 1


def _ref(
    x: Tensor,
    kernel: Tensor,
    add: Tensor | None,
    up: bool,
    padding: int,
    size: tuple[int, int],
    gain: float,
    scale: float,
    box: bool,
) -> Tensor:
    """`(gain * R(x) + add) * scale`; when upsampling after halving an odd size, `size` restores it."""
    channels, k = x.shape[1], kernel.shape[-1]
    if up and not box and x.is_cpu and x.itemsize == 2:  # PyTorch's transposed convolution takes 30 times as long there
        wide = None if add is None else add.float()
        return _ref(x.float(), kernel, wide, up, padding, size, gain, scale, box).to(x.dtype)
    if up:
        natural = _size(x, kernel, up, padding)
        missing = size[0] - natural[0], size[1] - natural[1]
    if x.numel() == 0:
        y = x.new_zeros((*x.shape[:2], *size)) + x.sum()
    elif box and up:
        y = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.pad(y * (gain / 4) if gain != 4 else y, (0, missing[1], 0, missing[0]))
    elif box:
        y = F.avg_pool2d(x, k)
        y = y * gain if gain != 1 else y
    else:
        weight = (kernel * gain).to(x.dtype).expand(channels, -1, -1, -1)
        if up:
            y = F.conv_transpose2d(x, weight, None, 2, padding, missing, channels)
        else:
            y = F.conv2d(x, weight, None, 2, padding, groups=channels)
    if add is not None:
        y = y + add
    return y if scale == 1 else y * scale
