"""The inputs of frozen backbones from an image: resized, normalised, in their dtype, channels_last; in one read.

    y[b][n, c] = scale[b][c] * B(x)[n, c] + shift[b][c]

for every backbone b, where B is the bilinear resize with align_corners=False. The only channel of a grey image counts
three times. B's weights sum to one, so the order of the two steps does not matter; normalising last is one multiply-add
on numbers that are written anyway. The gradient is the exact adjoint, one pass over the gradients of all backbones; it
is linear in them and its own gradient is y without the shift. Nothing is saved for either.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import InputError
from gdd_fast.ops._memory_format import memory_format

OPERATOR = Operator("discriminator_input", fused=frozenset({"cuda", "cpp"}), float64=False)
_choose = chooser(OPERATOR)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BACKBONES = 4

Triples = Sequence[Sequence[float]]


def discriminator_input_ref(
    x: Tensor, scale: Triples, shift: Triples, size: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The definition; arguments as for `discriminator_input`, and float64 images too."""
    dtype = x.dtype if dtype is None else dtype
    return _ref(x, _flat(scale), _flat(shift), size, dtype)


def discriminator_input(
    x: Tensor,
    scale: Triples,
    shift: Triples,
    size: int,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Images -> one (N, 3, size, size) tensor for each backbone, in `dtype` (default: that of x) and channels_last.

    Args:
        x: (N, 1 or 3, H, W), float32, bfloat16 or float16, in any memory layout. float64, of x or of the results,
            is for checks: the definition computes it, whatever "auto" would take otherwise.
        scale, shift: for each of 1 to 4 backbones three numbers; for images in [-1, 1] those are `0.5 / std` and
            `(0.5 - mean) / std`.
        size: height and width of the results.
        dtype: of the results.
        backend: "auto", "torch", "cuda" or "cpp"; see gdd_fast.backend.

    Gradients that are not channels_last are copied once first. Differentiable in x, any number of times.

    Raises:
        InputError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run here.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.dim() != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
        raise InputError(f"discriminator_input: images must be (N, 1 or 3, H, W), not {tuple(x.shape)}")
    if not {x.dtype, dtype} <= {*DTYPES, torch.float64}:
        raise InputError(f"discriminator_input: float32, bfloat16 or float16, not {x.dtype} to {dtype}")
    if not 1 <= len(scale) <= MAX_BACKBONES or len(scale) != len(shift) or {len(t) for t in (*scale, *shift)} != {3}:
        raise InputError(
            f"discriminator_input: scale and shift: three numbers for each of 1 to {MAX_BACKBONES} backbones"
        )
    if not 1 <= size < 2**15 or max(x.shape[2:]) >= 2**16:
        raise InputError(
            f"discriminator_input: size must be from 1 to {2**15 - 1} and the sides of images below {2**16}, "
            f"not {size} and {tuple(x.shape[2:])}"
        )
    implementation = _choose(backend, x.device.type, torch.float64 in (x.dtype, dtype))
    return torch.ops.gdd_fast.discriminator_input(x, _flat(scale), _flat(shift), size, dtype, implementation)


torch.library.define(
    "gdd_fast::discriminator_input",
    "(Tensor x, float[] scale, float[] shift, int size, ScalarType dtype, str implementation) -> Tensor[]",
)
torch.library.define(
    "gdd_fast::discriminator_input_backward",
    "(Tensor[] dys, float[] scale, SymInt channels, SymInt height, SymInt width, ScalarType dtype, bool channels_last, "
    "str implementation) -> Tensor",
)


@torch.library.impl("gdd_fast::discriminator_input", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, scale: list[float], shift: list[float], size: int, dtype: torch.dtype, implementation: str
) -> list[Tensor]:
    if implementation == "torch":
        return _ref(x, scale, shift, size, dtype)
    return torch.ops.gdd_fast_C.discriminator_input(x, scale, shift, size, dtype)


@torch.library.impl("gdd_fast::discriminator_input_backward", "CompositeExplicitAutograd")
def _adjoint(
    dys: list[Tensor],
    scale: list[float],
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    channels_last: bool,
    implementation: str,
) -> Tensor:
    if implementation == "torch":
        dx = _adjoint_ref(dys, scale, channels, height, width).to(dtype)
        return dx.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    dys = [dy.contiguous(memory_format=torch.channels_last) for dy in dys]
    return torch.ops.gdd_fast_C.discriminator_input_backward(dys, scale, channels, height, width, dtype, channels_last)


@torch.library.register_fake("gdd_fast::discriminator_input")
def _(x, scale, shift, size, dtype, implementation) -> list[Tensor]:
    options = {"dtype": dtype, "device": x.device, "memory_format": torch.channels_last}
    return [torch.empty((x.shape[0], 3, size, size), **options) for _ in range(len(scale) // 3)]


@torch.library.register_fake("gdd_fast::discriminator_input_backward")
def _(dys, scale, channels, height, width, dtype, channels_last, implementation) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (dys[0].shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=dys[0].device, memory_format=memory_format)


def _setup_forward(ctx, inputs, output) -> None:
    x, ctx.scale, _, _, _, ctx.implementation = inputs
    ctx.shape, ctx.dtype = x.shape[1:], x.dtype
    ctx.channels_last = memory_format(x) == torch.channels_last


def _backward(ctx, dys: list[Tensor | None]):
    present = [b for b, dy in enumerate(dys) if dy is not None]
    scale = [s for b in present for s in ctx.scale[3 * b : 3 * b + 3]]
    dx = None
    if present and ctx.needs_input_grad[0]:
        dx = torch.ops.gdd_fast.discriminator_input_backward(
            [dys[b] for b in present], scale, *ctx.shape, ctx.dtype, ctx.channels_last, ctx.implementation
        )
    return dx, None, None, None, None, None


def _setup_adjoint(ctx, inputs, output) -> None:
    dys, ctx.scale, _, _, _, _, _, ctx.implementation = inputs
    ctx.size, ctx.dtype = dys[0].shape[3], dys[0].dtype


def _double_backward(ctx, ddx: Tensor):
    no_shift = [0.0] * len(ctx.scale)
    ddys = torch.ops.gdd_fast.discriminator_input(ddx, ctx.scale, no_shift, ctx.size, ctx.dtype, ctx.implementation)
    return ddys, None, None, None, None, None, None, None


torch.library.register_autograd("gdd_fast::discriminator_input", _backward, setup_context=_setup_forward)
torch.library.register_autograd(
    "gdd_fast::discriminator_input_backward", _double_backward, setup_context=_setup_adjoint
)


def _flat(triples: Triples) -> list[float]:
    return [float(number) for triple in triples for number in triple]


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """(1, 3, 1, 1) made on the device by fills: a copy from host memory could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((), value) for value in values]).view(1, 3, 1, 1)


def _ref(x: Tensor, scale: list[float], shift: list[float], size: int, dtype: torch.dtype) -> list[Tensor]:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if y.shape[2:] != (size, size) and y.numel():
        y = F.interpolate(y, (size, size), mode="bilinear", align_corners=False)
    elif not y.numel():
        y = y.new_zeros((0, y.shape[1], size, size)) + y.sum()
    results = []
    for b in range(0, len(scale), 3):
        s, t = (_per_channel(values[b : b + 3], y) for values in (scale, shift))
        results.append(torch.addcmul(t, y, s).to(dtype).contiguous(memory_format=torch.channels_last))
    return results


def _adjoint_ref(dys: list[Tensor], scale: list[float], channels: int, height: int, width: int) -> Tensor:
    wide = torch.promote_types(dys[0].dtype, torch.float32)
    scaled = [dy.to(wide) * _per_channel(scale[3 * b : 3 * b + 3], dy.to(wide)) for b, dy in enumerate(dys)]
    total = functools.reduce(torch.add, scaled)
    total = total.sum(1, keepdim=True) if channels == 1 else total
    n, size = total.shape[0], total.shape[3]
    if (height, width) == (size, size) or n == 0:
        return total.new_zeros((n, channels, height, width)) if n == 0 else total
    return torch.ops.aten.upsample_bilinear2d_backward(
        total.contiguous(), [size, size], [n, channels, height, width], False
    )
