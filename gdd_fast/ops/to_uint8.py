"""Network images to bytes: `(x * 127.5 + 128)` clipped to [0, 255], truncated, channels moved last.

This is EDM's conversion for image files and for every published FID: products and sums are rounded separately, in
float32, or in float64 if x is float64. It is plain PyTorch on every device, as images are small next to network maps.
"""

import torch
from torch import Tensor

from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import DTYPES, compute_dtype


def to_uint8(x: Tensor) -> Tensor:
    """Convert images in [-1, 1] to bytes, ready for an image file.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, in any memory layout.

    Returns:
        uint8 (N, H, W, C), contiguous, on x's device. Values outside [-1, 1] are clipped; NaN, for which EDM's cast is
        undefined, becomes 0. The result carries no gradient, whether or not x requires one.

    Raises:
        InputError: x is not four-dimensional or of another dtype.
    """
    if x.dim() != 4:
        raise InputError(f"to_uint8: x must be (N, C, H, W), not of shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise InputError(f"to_uint8: x must be float32, bfloat16, float16 or float64 in [-1, 1], not {x.dtype}")
    y = x.detach().to(compute_dtype(x)) * 127.5 + 128
    y = torch.fmax(y, y.new_zeros(())).clamp(max=255)  # fmax ignores NaN: 0
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
