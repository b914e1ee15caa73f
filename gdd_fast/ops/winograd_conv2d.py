"""3x3 convolutions with constant weights by Winograd's method, on a CPU: `conv2d(x, w, bias, padding=1)`.

A tile of 4x4 pixels takes 36 products per pair of channels instead of 144: F(4x4, 3x3) of Lavin and Gray, arXiv
1509.09308. Sums and products are in float32 whatever the dtype of x. For inference: without gradients.

"cpp" has AVX2 and AVX-512 kernels, for weights that `winograd_weight` has transformed once. These take four times the
memory of the float32 weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Operator, obstacle
from gdd_fast.errors import InputError

OPERATOR = Operator("winograd_conv2d", fused=frozenset({"cpp"}))

DTYPES = (torch.float32, torch.bfloat16)
LEAST_TILES = 16
"""The fewest tiles for which a call's products take longer than loading its weights from memory; see
docs/cpu_operators.md."""


def winograd_conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, for a plain weight (out, in, 3, 3); other arguments as for `winograd_conv2d`."""
    return F.conv2d(x.float(), weight.float(), bias, padding=1).to(x.dtype)


def takes(weight: Tensor) -> bool:
    """Whether there is a kernel for this weight (out, in, K, K): 3x3, `in` a multiple of 16 and `out` of 32, on a
    processor with AVX2 or AVX-512, float32 or bfloat16."""
    out_channels, channels, *kernel = weight.shape
    fits = kernel == [3, 3] and channels % 16 == 0 and out_channels % 32 == 0
    fits = fits and weight.dtype in DTYPES and weight.device.type == "cpu"
    return fits and obstacle(OPERATOR, "cpp", "cpu") is None and torch.ops.gdd_fast_C.winograd_conv2d_panel() > 0


def tiles(shape: torch.Size) -> int:
    """Tiles of 4x4 pixels in maps of `shape` (N, C, H, W)."""
    n, _, h, w = shape
    return n * -(-h // 4) * -(-w // 4)


def winograd_weight(weight: Tensor) -> Tensor:
    """A weight (out, in, 3, 3) that `takes` accepts, as `winograd_conv2d` reads it: float32, for this processor only.

    Raises InputError for any other weight.
    """
    if weight.dim() != 4 or not takes(weight):
        raise InputError(f"winograd_weight: there is no kernel for a weight {weight.dtype} {tuple(weight.shape)} here")
    return torch.ops.gdd_fast_C.winograd_conv2d_weight(weight)


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution with zero padding of one pixel.

    Args:
        x: (N, C, H, W), float32 or bfloat16; channels_last memory is read in place, other memory is copied.
        weight: from `winograd_weight`.
        bias: float32 (out,) or None.

    Returns:
        (N, out, H, W) in x's dtype, channels_last.

    Raises:
        InputError: shapes or dtypes do not fit, or a gradient would be recorded.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise InputError("winograd_conv2d has no gradient: call it under torch.no_grad()")
    if weight.dim() != 4 or x.dim() != 4 or x.shape[1] != weight.shape[2] or x.dtype not in DTYPES:
        raise InputError(
            f"winograd_conv2d: x must be float32 or bfloat16 (N, {weight.shape[2:3]}, H, W), "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (weight.shape[1] * weight.shape[3],)):
        raise InputError(f"winograd_conv2d: the bias does not fit: {bias.dtype} {tuple(bias.shape)}")
    return torch.ops.gdd_fast_C.winograd_conv2d.default(x, weight, bias)
