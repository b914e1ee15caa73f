"""Each operator beside what a user would run instead, on inputs of one shape.

A function here takes a layer of the real networks (layer_calls.py), batch, type and device, and returns the
Problem. "official" follows the settings of the public GDD code on stock PyTorch, "stock" is the best of plain PyTorch.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.layer_calls import AttentionCall, ConvCall, MapCall, NormCall, ResampleCall
from benchmarks.harness.operator_case import Problem, fused_peers, nchw, package
from gdd_fast.layers.convolution import resample_kernel
from gdd_fast.ops import (
    attention,
    discriminator_input,
    frozen_conv2d_relu,
    group_norm_silu,
    max_pool2x2,
    resample2d,
    residual,
    to_uint8,
)

EPS = 1e-6


def norm_problem(layer: NormCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """group_norm_silu; a pair in the decoder, an embedding added (NCSN++) or scale and shift (ADM)."""
    c, side, groups = sum(layer.channels), layer.resolution, layer.num_groups
    x, *skip = (_map(batch, channels, side, dtype, device) for channels in layer.channels)
    rows = {name: torch.randn((batch, c), device=device, dtype=dtype) for name in ("add", "scale", "shift")}
    inputs = {
        "x": x,
        "skip": skip[0] if skip else None,
        "weight": torch.rand(c, device=device) + 0.5,
        "bias": torch.randn(c, device=device),
        "add": rows["add"] if layer.add else None,
        "scale": rows["scale"] if layer.scale else None,
        "shift": rows["shift"] if layer.scale else None,
    }
    activation = "silu" if layer.silu else None

    def ours(x, skip, weight, bias, *, backend, **rows) -> Tensor:
        joined = x if skip is None else (x, skip)
        options = {"activation": activation, "backend": backend}
        return group_norm_silu.group_norm_silu(joined, groups, weight, bias, EPS, **rows, **options)

    def definition(x, skip, weight, bias, **rows) -> Tensor:
        joined = x if skip is None else (x, skip)
        return group_norm_silu.group_norm_silu_ref(joined, groups, weight, bias, EPS, **rows, activation=activation)

    def stock(x, skip, weight, bias, add, scale, shift, *, wide: bool = False) -> Tensor:
        h = x if skip is None else torch.cat([x, skip], 1)
        h = h if add is None else h + add[:, :, None, None]
        kind = torch.float32 if wide else h.dtype
        y = F.group_norm(h.to(kind), groups, weight.to(kind), bias.to(kind), EPS).to(h.dtype)
        if scale is not None:
            y = torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None] + 1)
        return F.silu(y) if activation else y

    def apex() -> Any:
        module = package("apex.contrib.group_norm")
        norm = module.GroupNorm(
            groups, c, eps=EPS, device=device, dtype=torch.float32, act="silu" if activation else ""
        )

        def run(x, skip, weight, bias, add, scale, shift) -> Tensor:
            h = x if skip is None else torch.cat([x, skip], 1)
            h = h if add is None else h + add[:, :, None, None]
            norm.weight, norm.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)
            return norm(h)

        return run

    wanted = tuple(name for name, t in inputs.items() if t is not None)
    return Problem(
        inputs,
        definition,
        {
            "official": nchw(lambda **given: stock(**given, wide=True)),
            "stock": stock,
            **fused_peers(group_norm_silu.OPERATOR, device, ours),
        },
        differentiable=wanted,
        extra={"apex": apex} if device.type == "cuda" and not layer.scale else {},
    )


def residual_problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """(h + skip) * sqrt(1/2), as NCSN++ ends its blocks."""
    h, skip = (_map(batch, layer.channels, layer.resolution, dtype, device) for _ in range(2))
    scale = math.sqrt(0.5)

    def ours(h, skip, *, backend) -> Tensor:
        return residual.residual(h, skip, scale=scale, backend=backend)

    def stock(h, skip) -> Tensor:
        return (h + skip) * scale

    peers = {"official": nchw(lambda **t: stock(**t)), "stock": stock}
    fused = fused_peers(residual.OPERATOR, device, ours)
    return Problem({"h": h, "skip": skip}, stock, peers | fused, ("h", "skip"), saved_bytes=0)


def resample_problem(
    layer: ResampleCall,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
    diffusers: bool = True,
) -> Problem:
    """Up- and downsampling by two with the networks' filters, beside a copy of the input."""
    x = _map(batch, layer.channels, layer.resolution, dtype, device).contiguous(memory_format=layout)
    kernel = resample_kernel(layer.taps).to(device)
    box = layer.taps == (1, 1)
    options = {"up": layer.up, "padding": layer.padding}

    def ours(x, *, backend) -> Tensor:
        return resample2d.resample2d(x, kernel, **options, box=box, backend=backend)

    def stock(x, *, box: bool = box) -> Tensor:
        return resample2d.resample2d_ref(x, kernel.to(x.dtype), **options, box=box)

    def upfirdn() -> Any:
        native = package("diffusers.models.upsampling").upfirdn2d_native
        k, pad = len(layer.taps), layer.padding
        row = torch.tensor(layer.taps, dtype=torch.float32)
        factor = 4.0 if layer.up else 1.0
        taps = (torch.outer(row, row) / row.sum().square() * factor).to(device=device, dtype=dtype)
        edges = (k - 1 - pad, k - 2 - pad) if layer.up else (pad, pad)
        return lambda x: native(x, taps, up=2 if layer.up else 1, down=1 if layer.up else 2, pad=edges)

    peers = {"official": nchw(lambda **t: stock(**t, box=False)), "stock": stock}
    fused = fused_peers(resample2d.OPERATOR, device, ours)
    extra, bounds = {"diffusers": upfirdn} if diffusers else {}, {"copy of x": lambda x: x.clone()}
    return Problem({"x": x}, stock, peers | fused, ("x",), saved_bytes=0, extra=extra, bounds=bounds)


def attention_problem(layer: AttentionCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Attention on the packed qkv of EDM's networks."""
    qkv = _map(batch, 3 * layer.channels, layer.resolution, dtype, device)
    heads = layer.heads

    def ours(qkv, *, backend) -> Tensor:
        return attention.attention(qkv, heads, backend=backend)

    def official(qkv) -> Tensor:
        """Products and a float32 softmax one after the other, probabilities in memory."""
        n, packed, h, w = qkv.shape
        q, k, v = qkv.reshape(n * heads, packed // (3 * heads), 3, h * w).unbind(2)
        logits = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float())
        return torch.einsum("nqk,nck->ncq", logits.softmax(2).to(v.dtype), v).reshape(n, packed // 3, h, w)

    def tokens_first(function) -> Any:
        """For packages that take (N, tokens, heads, D)."""

        def run(qkv) -> Tensor:
            n, packed, h, w = qkv.shape
            q, k, v = qkv.permute(0, 2, 3, 1).reshape(n, h * w, heads, packed // (3 * heads), 3).unbind(4)
            y = function(q.contiguous(), k.contiguous(), v.contiguous())
            return y.reshape(n, h, w, packed // 3).permute(0, 3, 1, 2)

        return run

    extra = {}
    if device.type == "cuda":
        extra["xformers"] = lambda: tokens_first(package("xformers.ops").memory_efficient_attention)
        if dtype != torch.float32:
            extra["flash_attn"] = lambda: tokens_first(package("flash_attn").flash_attn_func)
    stock = partial(attention.attention_ref, num_heads=heads)
    peers = {"official": nchw(official), "stock": lambda qkv: stock(qkv)}
    fused = fused_peers(attention.OPERATOR, device, ours)
    definition = partial(attention.attention_formula, num_heads=heads)
    return Problem({"qkv": qkv}, lambda qkv: definition(qkv), peers | fused, ("qkv",), extra=extra)


def conv_problem(layer: ConvCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A frozen convolution with its activation; the gradient of the input alone is wanted."""
    out_channels, per_group = layer.size[:2]
    x = _map(batch, per_group * layer.groups, layer.resolution, dtype, device)
    weight = torch.randn(layer.size, device=device, dtype=dtype) / math.sqrt(math.prod(layer.size[1:]))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(out_channels, device=device, dtype=dtype)
    geometry = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}

    def stock(x, weight, bias) -> Tensor:
        y = F.conv2d(x, weight, bias, **geometry)
        return F.relu_(y) if layer.activation == "relu" else F.relu6(y, inplace=True)

    def ours(x, weight, bias, *, backend) -> Tensor:
        options = {"activation": layer.activation, "backend": backend}
        return frozen_conv2d_relu.frozen_conv2d_relu(x, weight, bias, **geometry, **options)

    peers = {"official": nchw(lambda **t: stock(**t)), "stock": stock}
    fused = fused_peers(frozen_conv2d_relu.OPERATOR, device, ours)
    side = (layer.resolution + 2 * layer.padding - layer.size[2]) // layer.stride + 1
    # backward needs the weight, and of each output whether it was cut off: a bit
    mask = -(-batch * out_channels * side * side // 8)
    saved = weight.numel() * weight.element_size() + 2 * mask
    return Problem({"x": x, "weight": weight, "bias": bias}, stock, peers | fused, ("x",), saved_bytes=saved)


def pool_problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Max pooling over 2x2 windows."""
    x = _map(batch, layer.channels, layer.resolution, dtype, device)

    def stock(x) -> Tensor:
        return F.max_pool2d(x, 2)

    def ours(x, *, backend) -> Tensor:
        return max_pool2x2.max_pool2x2(x, backend=backend)

    peers = {"official": nchw(lambda x: stock(x)), "stock": stock}
    fused = fused_peers(max_pool2x2.OPERATOR, device, ours)
    # backward needs the place of each maximum, one byte per output
    return Problem({"x": x}, stock, peers | fused, ("x",), saved_bytes=2 * (x.numel() // 4))


def input_problem(resolution: int, batch: int, dtype: torch.dtype, device: torch.device, size: int = 224) -> Problem:
    """Generated images to the inputs of two backbones."""
    x = _map(batch, 3, resolution, torch.float32, device)
    means, stds = ((0.485, 0.456, 0.406), (0.5,) * 3), ((0.229, 0.224, 0.225), (0.5,) * 3)
    scale = [[0.5 / s for s in std] for std in stds]
    shift = [[(0.5 - m) / s for m, s in zip(mean, std, strict=True)] for mean, std in zip(means, stds, strict=True)]

    def official(x) -> list[Tensor]:
        """Enlarged for each backbone anew, then normalised."""
        results = []
        for factors, offsets in zip(scale, shift, strict=True):
            large = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
            parts = [torch.tensor(row, dtype=x.dtype, device=device)[:, None, None] for row in (factors, offsets)]
            results.append((large * parts[0] + parts[1]).to(dtype))
        return results

    def ours(x, *, backend) -> list[Tensor]:
        return discriminator_input.discriminator_input(x, scale, shift, size, dtype, backend=backend)

    def stock(x) -> list[Tensor]:
        wanted = torch.float64 if x.dtype == torch.float64 else dtype
        return discriminator_input.discriminator_input_ref(x, scale, shift, size, wanted)

    peers = {"official": nchw(official), "stock": stock}
    fused = fused_peers(discriminator_input.OPERATOR, device, ours)
    return Problem({"x": x}, stock, peers | fused, ("x",), saved_bytes=0)


def bytes_problem(resolution: int, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Images to bytes; the same bits from all."""
    x = _map(batch, 3, resolution, dtype, device)

    def official(x) -> Tensor:
        return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def ours(x, *, backend) -> Tensor:
        return to_uint8.to_uint8(x, backend=backend)

    def definition(x) -> Tensor:
        return to_uint8.to_uint8_ref(x.to(dtype))  # in the type that is timed: bytes have no rounding to compare

    peers = {"official": nchw(official), "stock": lambda x: official(x)}
    return Problem({"x": x}, definition, peers | fused_peers(to_uint8.OPERATOR, device, ours))


def by_definition(name: str, parameters: Sequence[str] = ()) -> Callable[..., Problem]:
    """What makes a Problem of `gdd_fast.ops.<name>`, called with a map x and a vector of C numbers for each of
    `parameters`; the peers are its own definition."""
    module = importlib.import_module(f"gdd_fast.ops.{name}")
    function, definition = getattr(module, name), getattr(module, f"{name}_ref")

    def problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        inputs = {"x": _map(batch, layer.channels, layer.resolution, dtype, device)}
        inputs |= {name: torch.randn(layer.channels, device=device, dtype=dtype) for name in parameters}
        call = lambda *, backend, **given: function(*given.values(), backend=backend)
        plain = lambda **given: definition(*given.values())
        peers = {"official": nchw(lambda **given: plain(**given)), "stock": plain}
        return Problem(inputs, plain, peers | fused_peers(module.OPERATOR, device, call), tuple(inputs))

    return problem


def _map(n: int, c: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random and channels_last, which everything but the peer official reads."""
    x = torch.randn((n, c, side, side), device=device)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
