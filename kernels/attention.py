"""Self-attention over pixels in Triton, on the packed result of the qkv convolution in channels_last memory.

FlashAttention-2's schedule (Dao, arXiv 2307.08691): a program has one tile of queries (or, for gradients of keys and
values, of keys) of one head of one image and loops over the keys (or queries), with running maxima and sums in float32.
Backward recomputes the probabilities from the logarithms of their sums. Every result has one writer, so it repeats to
the bit. q, k and v are read in the convolution's output and their gradients written likewise: channel c of head h is at
h * STRIDE_H + c * STRIDE_C, and q, k and v are STRIDE_J apart. Offsets of images are 64-bit, those within an image
32-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import configuration, launch, on_its_device

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, rows, tokens, stride_t, D: tl.constexpr, STRIDE_C: tl.constexpr):
    """Tokens `rows` of D channels, zero beyond the last token."""
    offsets = rows[:, None] * stride_t + tl.arange(0, D)[None, :] * STRIDE_C
    return tl.load(ptr + offsets, rows[:, None] < tokens, other=0)


@triton.jit
def _store(ptr, value, rows, tokens, stride_t, D: tl.constexpr, STRIDE_C: tl.constexpr):
    offsets = rows[:, None] * stride_t + tl.arange(0, D)[None, :] * STRIDE_C
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), rows[:, None] < tokens)


@triton.jit
def _program(tokens, BLOCK: tl.constexpr):
    """(tile of tokens, image and head) of this program, in a one-dimensional grid, as others are limited to 65535."""
    tiles = tl.cdiv(tokens, BLOCK)
    pid = tl.program_id(0)
    return pid % tiles * BLOCK + tl.arange(0, BLOCK), (pid // tiles).to(tl.int64)


@triton.jit
def _bases(qkv_ptr, y_ptr, pair, tokens, heads, C: tl.constexpr, D: tl.constexpr, STRIDE_H: tl.constexpr):
    """Where this image and head begin, in qkv, in y and in statistics."""
    image, head = pair // heads, pair % heads
    qkv = qkv_ptr + image * tokens * 3 * C + head * STRIDE_H
    return qkv, y_ptr + image * tokens * C + head * D, pair * tokens


@triton.jit
def forward_kernel(
    qkv_ptr, y_ptr, lse_ptr, tokens, heads, scale,
    C: tl.constexpr, D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_J: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, pair = _program(tokens, BLOCK_Q)
    qkv, y_base, row_base = _bases(qkv_ptr, y_ptr, pair, tokens, heads, C, D, STRIDE_H)
    q = _tile(qkv, rows, tokens, 3 * C, D, STRIDE_C)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    y = tl.zeros((BLOCK_Q, D), tl.float32)
    for start in range(0, tokens, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k = _tile(qkv + STRIDE_J, columns, tokens, 3 * C, D, STRIDE_C)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)  # to the base 2
        logits = tl.where(columns[None, :] < tokens, logits, -float("inf"))
        now = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        v = _tile(qkv + 2 * STRIDE_J, columns, tokens, 3 * C, D, STRIDE_C)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        largest = now
    _store(y_base, y / total[:, None], rows, tokens, C, D, 1)
    tl.store(lse_ptr + row_base + rows, largest + tl.log2(total), rows < tokens)


@triton.jit
def backward_q_kernel(
    qkv_ptr, y_ptr, dy_ptr, lse_ptr, delta_ptr, dqkv_ptr, tokens, heads, scale,
    C: tl.constexpr, D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_J: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows, pair = _program(tokens, BLOCK_Q)
    qkv, y_base, row_base = _bases(qkv_ptr, y_ptr, pair, tokens, heads, C, D, STRIDE_H)
    dqkv, dy_base, _ = _bases(dqkv_ptr, dy_ptr, pair, tokens, heads, C, D, STRIDE_H)
    lse = tl.load(lse_ptr + row_base + rows, rows < tokens, other=0)
    delta = tl.zeros((BLOCK_Q,), tl.float32)
    for c in range(0, D, CHUNK):
        dy = _tile(dy_base + c, rows, tokens, C, CHUNK, 1).to(tl.float32)
        delta += tl.sum(dy * _tile(y_base + c, rows, tokens, C, CHUNK, 1).to(tl.float32), 1)
    tl.store(delta_ptr + row_base + rows, delta, rows < tokens)
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    for start in range(0, tokens, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        logits = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        dp = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for c in range(0, D, CHUNK):
            q = _tile(qkv + c * STRIDE_C, rows, tokens, 3 * C, CHUNK, STRIDE_C)
            k = _tile(qkv + STRIDE_J + c * STRIDE_C, columns, tokens, 3 * C, CHUNK, STRIDE_C)
            logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
            dy = _tile(dy_base + c, rows, tokens, C, CHUNK, 1)
            v = _tile(qkv + 2 * STRIDE_J + c * STRIDE_C, columns, tokens, 3 * C, CHUNK, STRIDE_C)
            dp = tl.dot(dy, tl.trans(v), dp, input_precision="ieee")
        p = tl.where(columns[None, :] < tokens, tl.exp2(logits * (scale * _LOG2E) - lse[:, None]), 0.0)
        ds = p * (dp - delta[:, None])
        k = _tile(qkv + STRIDE_J, columns, tokens, 3 * C, D, STRIDE_C)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dqkv, dq * scale, rows, tokens, 3 * C, D, STRIDE_C)


@triton.jit
def backward_kv_kernel(
    qkv_ptr, dy_ptr, lse_ptr, delta_ptr, dqkv_ptr, tokens, heads, scale,
    C: tl.constexpr, D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_J: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, pair = _program(tokens, BLOCK_K)
    qkv, dy_base, row_base = _bases(qkv_ptr, dy_ptr, pair, tokens, heads, C, D, STRIDE_H)
    dqkv, _, _ = _bases(dqkv_ptr, dy_ptr, pair, tokens, heads, C, D, STRIDE_H)
    k = _tile(qkv + STRIDE_J, columns, tokens, 3 * C, D, STRIDE_C)
    v = _tile(qkv + 2 * STRIDE_J, columns, tokens, 3 * C, D, STRIDE_C)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    for start in range(0, tokens, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = _tile(qkv, rows, tokens, 3 * C, D, STRIDE_C)
        dy = _tile(dy_base, rows, tokens, C, D, 1)
        lse = tl.load(lse_ptr + row_base + rows, rows < tokens, other=0)
        delta = tl.load(delta_ptr + row_base + rows, rows < tokens, other=0)
        # everything transposed: keys along rows
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
        p = tl.where(rows[None, :] < tokens, tl.exp2(logits - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dy), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dqkv + STRIDE_J, dk * scale, columns, tokens, 3 * C, D, STRIDE_C)
    _store(dqkv + 2 * STRIDE_J, dv, columns, tokens, 3 * C, D, STRIDE_C)


@on_its_device
def attention(qkv: Tensor, heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """channels_last qkv (N, 3 C, H, W) -> y (N, C, H, W) channels_last, and base-2 log-sums (N, heads, H * W)."""
    n, packed, h, w = qkv.shape
    y = torch.empty((n, packed // 3, h, w), dtype=qkv.dtype, device=qkv.device, memory_format=torch.channels_last)
    lse = torch.empty((n, heads, h * w), dtype=torch.float32, device=qkv.device)
    if y.numel():
        options, layout, scale = _arguments(qkv, heads, interleaved, "forward")
        grid = (triton.cdiv(h * w, options["BLOCK_Q"]) * n * heads,)
        launch(forward_kernel, grid, qkv, y, lse, h * w, heads, scale, **layout, **options)
    return y, lse


@on_its_device
def attention_backward(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, heads: int, interleaved: bool) -> Tensor:
    """The gradient of qkv, channels_last as all arguments are."""
    n, _, h, w = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if y.numel():
        options, layout, scale = _arguments(qkv, heads, interleaved, "backward")
        chunk = channels_at_once(layout["D"], qkv.element_size())
        grid = (triton.cdiv(h * w, options["BLOCK_Q"]) * n * heads,)
        launch(
            backward_q_kernel, grid, qkv, y, dy, lse, delta, dqkv, h * w, heads, scale, CHUNK=chunk, **layout, **options
        )
        grid = (triton.cdiv(h * w, options["BLOCK_K"]) * n * heads,)
        launch(backward_kv_kernel, grid, qkv, dy, lse, delta, dqkv, h * w, heads, scale, **layout, **options)
    return dqkv


def channels_at_once(head_dim: int, bytes_each: int) -> int:
    """How many channels the query gradient's products take at a time: in float32, without tensor cores here, each
    channel of both factors occupies a register."""
    return head_dim if bytes_each == 2 else min(head_dim, 32)


def launch_options(entry: dict, head_dim: int, bytes_each: int, direction: str) -> dict[str, int]:
    """Tiles and warps: those that `entry` of tuned.json names for this head width, type and direction."""
    return entry[f"{direction}-{max(head_dim, 64)}-{'fp32' if bytes_each == 4 else 'half'}"]


def _arguments(qkv: Tensor, heads: int, interleaved: bool, direction: str) -> tuple[dict, dict, float]:
    channels = qkv.shape[1] // 3
    d = channels // heads
    options = launch_options(configuration("attention", qkv.device), d, qkv.element_size(), direction)
    stride_h, stride_c, stride_j = (3 * d, 3, 1) if interleaved else (d, 1, channels)
    layout = {"C": channels, "D": d, "STRIDE_H": stride_h, "STRIDE_C": stride_c, "STRIDE_J": stride_j}
    return options, layout, d**-0.5
