"""Self-attention over the pixels of a feature map, on the packed output of the convolution that makes q, k and v.

Softmax is in float32 in every dtype. "torch" calls PyTorch's scaled_dot_product_attention; "triton" saves qkv and one
number per query and head, and recomputes the probabilities in backward.

EDM's convolution interleaves q, k and v. Parameters keep its order everywhere, in training, checkpoints and exports;
`gdd_fast.layers.self_attention.QkvConv2d` reorders its weight, a few hundred kilobytes against many megabytes of
activations, in every call, so that its output is in "blocks". In channels_last memory both implementations read blocks
in place; "interleaved" order costs "torch" a copy of them, contiguous memory that and a copy of the result.

"auto" takes the Triton kernels for shapes that kernels/tuned.json lists as measured faster than PyTorch's on the GPU's
architecture. None has been measured yet, so it is "torch" everywhere.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.backend import Backend, Operator, chooser
from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops._memory_format import compute_dtype, memory_format

OPERATOR = Operator("attention", fused=frozenset({"triton"}), opt_in=frozenset({"triton"}))
_resolve = chooser(OPERATOR)

Order = Literal["interleaved", "blocks"]
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_ref(qkv: Tensor, num_heads: int, order: Order = "interleaved") -> Tensor:
    """The definition by PyTorch's own attention, which is not twice differentiable on every device."""
    q, k, v = _tokens(qkv, num_heads, order)
    return _image(F.scaled_dot_product_attention(q, k, v), qkv)


def attention_formula(qkv: Tensor, num_heads: int, order: Order = "interleaved") -> Tensor:
    """The definition written out, differentiable any number of times."""
    q, k, v = _tokens(qkv, num_heads, order)
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return _image(logits.to(compute_dtype(qkv)).softmax(3).to(v.dtype) @ v, qkv)


def attention(qkv: Tensor, num_heads: int, order: Order = "interleaved", backend: Backend = "auto") -> Tensor:
    """softmax(q k' / sqrt(D)) v for every head of D channels, over all pixels of an image.

    Args:
        qkv: (N, 3 C, H, W), C = num_heads * D, floating. "triton" reads channels_last memory and copies any other.
        num_heads: how many heads share the channels.
        order: where channel c of head h of query (j = 0), key (1) and value (2) is among the 3 C:
            "interleaved" (EDM's) at (h * D + c) * 3 + j, "blocks" at j * C + h * D + c.
        backend: "auto", "torch" or "triton". "triton" supports float32, bfloat16 and float16, and D from 16 to 256, a
        power of two. It is twice differentiable; "torch" is if PyTorch's attention is.

    Returns:
        (N, C, H, W) in qkv's dtype and memory format.

    Raises:
        InputError: channels that do not divide, or an unknown order.
        BackendError: the requested backend cannot run here, or not with this head width or dtype.
    """
    if qkv.dim() != 4 or num_heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * num_heads):
        raise InputError(
            f"attention: qkv must be (N, 3 * channels, H, W) with channels for {num_heads} heads, not "
            f"{tuple(qkv.shape)}"
        )
    if order not in get_args(Order):
        raise InputError(f"attention: order must be one of {', '.join(get_args(Order))}, not {order!r}")
    if _choose(qkv, num_heads, backend) == "torch":
        return attention_ref(qkv, num_heads, order)
    check_triton(qkv.shape[1] // (3 * num_heads), qkv.dtype, qkv.device.type)
    if qkv.shape[1:].numel() >= 2**31:
        raise BackendError("attention: the triton backend takes fewer than 2^31 values per image; use 'torch'")
    layout = memory_format(qkv)
    y = _Attention.apply(qkv.contiguous(memory_format=torch.channels_last), num_heads, order)
    return y.contiguous(memory_format=layout)


def check_triton(head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Raise BackendError unless "triton" supports heads of `head_dim` channels in `dtype` on `device`."""
    if head_dim not in HEAD_DIMS or dtype not in DTYPES:
        raise BackendError(
            f"attention: backend 'triton' takes heads of {', '.join(map(str, HEAD_DIMS))} channels in float32, "
            f"bfloat16 or float16, not {head_dim} in {dtype}: use backend 'auto' or 'torch'"
        )
    if device == "cpu" and dtype == torch.bfloat16:
        raise BackendError("attention: Triton's interpreter does not multiply bfloat16 matrices: use another type")


def attention_inference(qkv: Tensor, num_heads: int, backend: Backend = "auto") -> Tensor:
    """`attention(qkv, num_heads, "blocks", backend)` without gradients, as a single operator, for little host time."""
    if _choose(qkv, num_heads, backend) == "torch":
        return torch.ops.gdd_fast.attention_inference.default(qkv, num_heads)
    return attention(qkv, num_heads, "blocks", "triton")


def _choose(qkv: Tensor, num_heads: int, backend: Backend) -> str:
    if backend == "auto" and qkv.is_cuda and not torch.compiler.is_compiling() and _measured_faster(qkv, num_heads):
        backend = "triton"
    return _resolve(backend, qkv.device.type)


def _measured_faster(qkv: Tensor, num_heads: int) -> bool:
    """Whether tuned.json lists this (tokens, channels per head, type) for this GPU's architecture."""
    from gdd_fast.kernels._launch import faster_than_sdpa

    shape = [qkv.shape[2] * qkv.shape[3], qkv.shape[1] // (3 * num_heads), str(qkv.dtype).removeprefix("torch.")]
    return shape in faster_than_sdpa(qkv.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, order: Order) -> Tensor:
        y, lse = torch.ops.gdd_fast.attention(qkv, num_heads, order == "interleaved")
        ctx.save_for_backward(qkv, y, lse)
        ctx.num_heads, ctx.order = num_heads, order
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _AttentionGradient.apply(dy, *ctx.saved_tensors, ctx.num_heads, ctx.order), None, None


class _AttentionGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, order: Order) -> Tensor:
        ctx.save_for_backward(dy, qkv)
        ctx.num_heads, ctx.order = num_heads, order
        dy = dy.contiguous(memory_format=torch.channels_last)
        return torch.ops.gdd_fast.attention_backward(dy, qkv, y, lse, num_heads, order == "interleaved")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ddqkv: Tensor) -> tuple[Tensor | None, ...]:
        # by the formula, which includes what goes through y and lse, both functions of qkv
        with torch.enable_grad():
            dy, qkv = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            y = attention_formula(qkv, ctx.num_heads, ctx.order)
            (dqkv,) = torch.autograd.grad(y, qkv, dy, create_graph=True)
            gradients = torch.autograd.grad(dqkv, (dy, qkv), ddqkv)
        return (*gradients, None, None, None, None)


# qkv, y, dy and the gradient are channels_last; lse holds base-2 logarithms, float32 (N, heads, H * W).
torch.library.define("gdd_fast::attention", "(Tensor qkv, int num_heads, bool interleaved) -> (Tensor, Tensor)")
# q, k and v in blocks, by PyTorch's own attention
torch.library.define("gdd_fast::attention_inference", "(Tensor qkv, int num_heads) -> Tensor")
torch.library.define(
    "gdd_fast::attention_backward",
    "(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int num_heads, bool interleaved) -> Tensor",
)


@torch.library.impl("gdd_fast::attention", "CompositeExplicitAutograd")
def _attention(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    from gdd_fast.kernels import attention as kernels

    return kernels.attention(qkv, num_heads, interleaved)


@torch.library.register_fake("gdd_fast::attention")
def _(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    n, packed, h, w = qkv.shape
    y = torch.empty((n, packed // 3, h, w), dtype=qkv.dtype, device=qkv.device, memory_format=torch.channels_last)
    return y, torch.empty((n, num_heads, h * w), dtype=torch.float32, device=qkv.device)


@torch.library.impl("gdd_fast::attention_inference", "CompositeExplicitAutograd")
def _attention_inference(qkv: Tensor, num_heads: int) -> Tensor:
    return attention_ref(qkv, num_heads, "blocks")


@torch.library.register_fake("gdd_fast::attention_inference")
def _(qkv: Tensor, num_heads: int) -> Tensor:
    n, packed, h, w = qkv.shape
    return torch.empty((n, packed // 3, h, w), dtype=qkv.dtype, device=qkv.device, memory_format=memory_format(qkv))


@torch.library.impl("gdd_fast::attention_backward", "CompositeExplicitAutograd")
def _attention_backward(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    from gdd_fast.kernels import attention as kernels

    return kernels.attention_backward(dy, qkv, y, lse, num_heads, interleaved)


@torch.library.register_fake("gdd_fast::attention_backward")
def _(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    return torch.empty_like(qkv)


def _tokens(qkv: Tensor, num_heads: int, order: Order) -> tuple[Tensor, ...]:
    """q, k and v, each (N, heads, H * W, D) with its channels side by side, as PyTorch's kernels read them."""
    n, packed, h, w = qkv.shape
    head_dim = packed // (3 * num_heads)
    if order == "blocks" and memory_format(qkv) is torch.channels_last:
        return qkv.permute(0, 2, 3, 1).reshape(n, h * w, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    if order == "interleaved":
        split = qkv.reshape(n, num_heads, head_dim, 3, h * w).permute(3, 0, 1, 4, 2)
    else:
        split = qkv.reshape(n, 3, num_heads, head_dim, h * w).permute(1, 0, 2, 4, 3)
        if split.stride(4) == 1:
            return split.unbind(0)
    return split.contiguous().unbind(0)


def _image(y: Tensor, qkv: Tensor) -> Tensor:
    """(N, heads, H * W, D) -> (N, C, H, W) in the memory format of qkv."""
    n, packed, h, w = qkv.shape
    if memory_format(qkv) is torch.channels_last:
        return y.transpose(1, 2).reshape(n, h, w, packed // 3).permute(0, 3, 1, 2)
    return y.transpose(2, 3).reshape(n, packed // 3, h, w).contiguous()
