"""DeiT-B distilled, 224x224 in patches of 16 (Touvron et al., arXiv 2012.12877)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.models.backbones.base import Backbone

_WIDTH, _DEPTH, _HEADS, _PATCH = 768, 12, 12, 16
_GRID = 224 // _PATCH
_EXTRA_TOKENS = 2  # class and distillation
_TAPPED_BLOCKS = (2, 5, 8, 11)


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: `softmax(q k^T / sqrt(D)) v`, all (N, heads, tokens, D)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention_ref` by `F.scaled_dot_product_attention`, but differentiable twice, as R1 needs.

    Written out, attention keeps a weight for every pair of tokens: for DeiT-B 0.94 MB per image and block in bfloat16,
    while queries, keys and values together take 0.91 MB. Here only these three are kept, and backward recomputes the
    rest: by the fused operator for a plain gradient, written out for one that will be differentiated again. If there is
    something to differentiate, a compiler gets the definition and fuses what it can.
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


class Attention(nn.Module):
    """Multi-head self-attention over `(N, tokens, width)`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeitBase(Backbone):
    """timm's `deit_base_distilled_patch16_224`: the image tokens after blocks 2, 5, 8 and 11, as 14x14 maps.

    All four maps have the same size; the random projection gives them four sizes (`random_projection.Reassemble`).
    """

    name = "deit_base_distilled_patch16_224"
    tap_channels = (_WIDTH,) * 4
    tap_strides = (_PATCH,) * 4
    fixed_resolution = 224
    unused_weights = ("norm.", "head.", "head_dist.")

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, _GRID**2 + _EXTRA_TOKENS, _WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": FrozenConv2d(3, _WIDTH, _PATCH, _PATCH)})
        self.blocks = nn.ModuleList(Block(_WIDTH, _HEADS) for _ in range(_DEPTH))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        cls_token, dist_token = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token))
        tokens = torch.cat([cls_token, dist_token, patches], dim=1) + self.pos_embed
        maps = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in _TAPPED_BLOCKS:
                maps.append(tokens[:, _EXTRA_TOKENS:].transpose(1, 2).unflatten(2, (_GRID, _GRID)))
        return tuple(maps)
