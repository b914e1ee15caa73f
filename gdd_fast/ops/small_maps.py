"""Operators for small maps of a folded network on a CPU: convolution, resampling and attention, each in one call.

At 16x16 pixels or fewer, a library call takes 40 to 170 microseconds, several times as long as its arithmetic: weights
are reordered, primitives looked up, and a 4 x 4 filter is convolved channel by channel. `panel_conv2d` can add further
1x1 convolutions and a residual block's other map to its sum.

"cpp" has AVX2 and AVX-512 kernels. Maps are float32 or bfloat16 and channels_last (others are copied); sums are in
float32. For inference: the operators record no gradient, and `gdd_fast_C` checks their arguments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Operator, obstacle

OPERATOR = Operator("small_maps", fused=frozenset({"cpp"}))

DTYPES = (torch.float32, torch.bfloat16)
MOST_TOKENS = 64
"""Pixels of an image up to which `small_attention` is faster than PyTorch's; see docs/cpu_operators.md."""
MOST_PRODUCTS = 1 << 23
"""Multiplications up to which `panel_conv2d` is faster than oneDNN."""


def runs_here() -> bool:
    """Whether this processor has kernels: AVX2 or AVX-512."""
    return obstacle(OPERATOR, "cpp", "cpu") is None and torch.ops.gdd_fast_C.panel_width(False) > 0


def panel_weight(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out, in, K, K) and further (out, in_i, 1, 1) as `panel_conv2d` reads them: float32 (panels, depth,
    panel), for this processor only."""
    out = weights[0].shape[0]
    rows = torch.cat([w.float().permute(2, 3, 1, 0).reshape(-1, out) for w in weights])
    narrow = torch.ops.gdd_fast_C.panel_width(True)
    panel = narrow if out <= narrow else torch.ops.gdd_fast_C.panel_width(False)
    rows = F.pad(rows, (0, -out % panel))
    return rows.unflatten(1, (-1, panel)).transpose(0, 1).contiguous()


def panel_conv2d_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor,
    padding: int,
    parts: Sequence[Tensor],
    add: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition: the convolution of x, those of `parts` with the further weights, the bias and `scale * add`."""
    y = F.conv2d(x.float(), weights[0].float(), bias, padding=padding)
    for part, weight in zip(parts, weights[1:], strict=True):
        y = y + F.conv2d(part.float(), weight.float())
    return (y if add is None else y + scale * add.float()).to(x.dtype)


def panel_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: int,
    padding: int,
    *,
    parts: Sequence[Tensor] = (),
    add: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A convolution with zero padding, plus further terms.

    Args:
        x: (N, C, H, W), float32 or bfloat16.
        weight: from `panel_weight`, for a window of `size` (1 or 3) and for each part.
        padding: rows and columns of zeros around x, less than 3.
        bias: float32 (out,).
        parts: up to two maps with the result's pixels and x's dtype, convolved 1x1.
        add: a map like the result, added `scale` times.

    Returns:
        (N, out, H', W') in x's dtype, channels_last.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    first, second = (*parts, None, None)[:2]
    return torch.ops.gdd_fast_C.panel_conv2d.default(x, first, second, weight, bias, size, padding, add, scale)


def small_resample2d(
    x: Tensor, kernel: Tensor, *, up: bool, padding: int, add: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """`resample2d` (definition: `resample2d_ref`) with a float32 filter; the result is channels_last."""
    return torch.ops.gdd_fast_C.small_resample2d.default(x, kernel, add, up, padding, scale)


def small_attention(qkv: Tensor, heads: int) -> Tensor:
    """`attention(qkv, heads, "blocks")`; the result is channels_last."""
    return torch.ops.gdd_fast_C.small_attention.default(qkv, heads)
