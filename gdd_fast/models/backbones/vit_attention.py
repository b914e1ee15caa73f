"""Self-attention of a frozen transformer: PyTorch's fused one, made differentiable twice.

PyTorch's fused attention has no second derivative, which R1 needs, and written out, attention keeps a weight for every
pair of tokens: of DeiT-B 0.94 MB per image and block in bfloat16, where queries, keys and values take 0.91 MB together.
Here these three alone are kept, and backward computes the rest anew: once more by the fused operator for a gradient,
written out for a gradient that is to be differentiated again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: `softmax(q k^T / sqrt(D)) v`, all (N, heads, tokens, D)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention_ref` by `F.scaled_dot_product_attention`, differentiable twice.

    A compiler is given the definition if there is something to differentiate, and fuses what it can.
    """
    if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
        return F.scaled_dot_product_attention(q, k, v)
    return attention_ref(q, k, v) if torch.compiler.is_compiling() else _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller wants a graph of the gradient itself
            inputs = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in inputs)
            return torch.autograd.grad(attention_ref(*inputs), inputs, dy, create_graph=True)
        with torch.enable_grad():
            inputs = tuple(t.detach().requires_grad_() for t in inputs)
            y = F.scaled_dot_product_attention(*inputs)
        return torch.autograd.grad(y, inputs, dy)
