"""Network images to bytes: `(x * 127.5 + 128)` clipped to [0, 255], truncated, channels moved last, in one pass.

This is EDM's conversion for image files and for every published FID, so a fused implementation must be equal to the
definition `to_uint8_ref` in every bit: products and sums are rounded apart (no fused multiply-add), in float32, or in
float64 if x is float64.
"""

import torch
from torch import Tensor

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import DTYPES, compute_dtype, evenly_spaced

OPERATOR = Operator("to_uint8", fused=frozenset({"triton"}))
_choose = chooser(OPERATOR)


def to_uint8_ref(x: Tensor) -> Tensor:
    """The definition. (N, C, H, W) floating -> uint8 (N, H, W, C), contiguous. NaN becomes 0."""
    y = x.to(compute_dtype(x)) * 127.5 + 128
    y = torch.fmax(y, y.new_zeros(())).clamp(max=255)  # fmax passes over NaN: 0
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_uint8(x: Tensor, backend: Backend = "auto") -> Tensor:
    """Convert images in [-1, 1] to bytes, ready for an image file.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64. Contiguous and channels_last memory (and any other in
            which the rows of an image are evenly spaced) is read where it lies; anything else is copied once first.
        backend: "auto", "torch" or "triton"; see gdd_fast.backend.

    Returns:
        uint8 (N, H, W, C), contiguous, on x's device. Values outside [-1, 1] are clipped; NaN, for which EDM's cast is
        undefined, becomes 0. The result carries no gradient, whether or not x requires one.

    Raises:
        InputError: x is not four-dimensional or of another dtype.
        BackendError: the backend asked for cannot run here.
    """
    if x.dim() != 4:
        raise InputError(f"to_uint8: x must be (N, C, H, W), not of shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise InputError(f"to_uint8: x must be float32, bfloat16, float16 or float64 in [-1, 1], not {x.dtype}")
    return torch.ops.gdd_fast.to_uint8(x.detach(), _choose(backend, x.device.type))


torch.library.define("gdd_fast::to_uint8", "(Tensor x, str implementation) -> Tensor")


@torch.library.impl("gdd_fast::to_uint8", "CompositeExplicitAutograd")
def _to_uint8(x: Tensor, implementation: str) -> Tensor:
    if implementation == "torch":
        return to_uint8_ref(x)
    from gdd_fast.kernels import to_uint8 as kernels

    return kernels.to_uint8(evenly_spaced(x))


@torch.library.register_fake("gdd_fast::to_uint8")
def _(x: Tensor, implementation: str) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, c), dtype=torch.uint8)
