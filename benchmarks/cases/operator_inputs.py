"""Each operator beside what a user would run instead, on inputs of one shape.

A function here takes a layer of the real networks (layer_calls.py), batch, type and device, and returns the
Problem.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.layer_calls import AttentionCall, ConvCall, MapCall, NormCall, ResampleCall
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.operator_case import Problem, package
from benchmarks.peers.networks import tf32
from gdd_fast.layers.convolution import resample_kernel
from gdd_fast.ops import (
    attention,
    frozen_conv2d_relu,
    group_norm_silu,
    max_pool2x2,
    resample2d,
    residual,
)

EPS = 1e-6


def norm_problem(layer: NormCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """group_norm_silu; a pair in the decoder, an embedding added (NCSN++) or scale and shift (ADM)."""
    c, side, groups = sum(layer.channels), layer.resolution, layer.num_groups
    x, *skip = (_map(batch, channels, side, dtype, device) for channels in layer.channels)
    rows = {name: torch.randn((batch, c), device=device, dtype=dtype) for name in ("add", "scale", "shift")}
    vectors = {"weight": torch.rand(c, device=device) + 0.5, "bias": torch.randn(c, device=device)}
    wanted = {"add": layer.add, "scale": layer.scale, "shift": layer.scale}
    inputs = {"x": x, "skip": skip[0] if skip else None, **vectors}
    inputs |= {name: row if wanted[name] else None for name, row in rows.items()}
    activation = "silu" if layer.silu else None

    def ours(x, skip, weight, bias, *, function=group_norm_silu.group_norm_silu, **options) -> Tensor:
        joined = x if skip is None else (x, skip)
        return function(joined, groups, weight, bias, EPS, **options, activation=activation)

    def stock(x, skip, weight, bias, add, scale, shift, *, wide: bool = False) -> Tensor:
        h = _added(x, skip, add)
        kind = torch.float32 if wide else h.dtype
        y = F.group_norm(h.to(kind), groups, weight.to(kind), bias.to(kind), EPS).to(h.dtype)
        if scale is not None:
            y = torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None] + 1)
        return F.silu(y) if activation else y

    def apex() -> Any:
        options = {"device": device, "dtype": torch.float32, "act": activation or ""}
        norm = package("apex.contrib.group_norm").GroupNorm(groups, c, eps=EPS, **options)

        def run(x, skip, weight, bias, add, scale, shift) -> Tensor:
            norm.weight, norm.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)
            return norm(_added(x, skip, add))

        return run

    def cudnn() -> Any:
        norm = cudnn_group_norm(groups, EPS, device)

        def run(x, skip, weight, bias, add, scale, shift) -> Tensor:
            y = norm(_added(x, skip, add).contiguous(memory_format=torch.channels_last), weight, bias)
            return F.silu(y) if activation else y

        return run

    return Problem(
        group_norm_silu.OPERATOR,
        inputs,
        ours,
        stock,
        official=partial(stock, wide=True),
        definition=partial(ours, function=group_norm_silu.group_norm_silu_ref),
        differentiable=tuple(name for name, t in inputs.items() if t is not None),
        # neither scales and shifts, and cudnn-frontend's rule refuses the sizes of the norms that do, ADM's
        extra={"apex": apex, "cudnn-frontend": cudnn} if device.type == "cuda" and not layer.scale else {},
    )


def cudnn_group_norm(groups: int, eps: float, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """cudnn-frontend's, whose kernels are for channels_last maps on sm_100, from 1.32 on, forward and backward.

    (x (N, C, H, W), weight, bias (C,)) -> the norm of x, differentiable. Weight and bias are cast to x's type, which
    the package asks for. Raises UnavailableError without the package, or on a GPU that its kernels are not for.
    """
    if torch.cuda.get_device_capability(device) < (10, 0):
        raise UnavailableError("cudnn-frontend's norms are for sm_100 and later")
    fprop, bprop = package("cudnn.norm.fprop.api").norm_fprop, package("cudnn.norm.bprop.api").norm_bprop
    variant = package("cudnn.norm").NormVariant.GROUP_NORM

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, mean, rstd = fprop(variant, x, weight, bias, eps=eps, num_groups=groups)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, mean, rstd = ctx.saved_tensors
            dx, dweight, dbias = bprop(variant, dy, x, weight, mean, rstd, num_groups=groups)
            return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return lambda x, weight, bias: Norm.apply(x, weight.to(x.dtype), bias.to(x.dtype))


def _added(x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
    h = x if skip is None else torch.cat([x, skip], 1)
    return h if add is None else h + add[:, :, None, None]


def residual_problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """(h + skip) * sqrt(1/2), as NCSN++ ends its blocks."""
    h, skip = (_map(batch, layer.channels, layer.resolution, dtype, device) for _ in range(2))
    scale = math.sqrt(0.5)
    ours = lambda h, skip, backend: residual.residual(h, skip, scale=scale, backend=backend)
    stock = lambda h, skip: (h + skip) * scale
    names = ("h", "skip")
    return Problem(residual.OPERATOR, {"h": h, "skip": skip}, ours, stock, differentiable=names, saved_bytes=0)


def resample_problem(layer: ResampleCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Up- and downsampling by two with the networks' filters, beside a copy of the input."""
    x = _map(batch, layer.channels, layer.resolution, dtype, device)
    kernel = resample_kernel(layer.taps).to(device)
    box = layer.taps == (1, 1)
    options = {"up": layer.up, "padding": layer.padding}

    def stock(x, *, box: bool = box) -> Tensor:
        return resample2d.resample2d_ref(x, kernel.to(x.dtype), **options, box=box)

    def upfirdn() -> Any:
        native = package("diffusers.models.upsampling").upfirdn2d_native
        k, pad = len(layer.taps), layer.padding
        taps = kernel[0, 0].to(dtype) * (4 if layer.up else 1)
        edges = (k - 1 - pad, k - 2 - pad) if layer.up else (pad, pad)
        return lambda x: native(x, taps, up=2 if layer.up else 1, down=1 if layer.up else 2, pad=edges)

    return Problem(
        resample2d.OPERATOR,
        {"x": x},
        partial(resample2d.resample2d, kernel=kernel, **options, box=box),
        stock,
        official=partial(stock, box=False),
        differentiable=("x",),
        saved_bytes=0,
        extra={"diffusers": upfirdn},
        bounds={"copy of x": lambda x: x.clone()},
    )


def attention_problem(layer: AttentionCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Attention on the packed qkv of EDM's networks."""
    qkv = _map(batch, 3 * layer.channels, layer.resolution, dtype, device)
    heads = layer.heads

    def official(qkv) -> Tensor:
        """Products and a float32 softmax one after the other, probabilities in memory."""
        n, packed, h, w = qkv.shape
        q, k, v = qkv.reshape(n * heads, packed // (3 * heads), 3, h * w).unbind(2)
        logits = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float())
        return torch.einsum("nqk,nck->ncq", logits.softmax(2).to(v.dtype), v).reshape(n, packed // 3, h, w)

    def tokens_first(module: str, name: str) -> Any:
        """A package's function, which takes (N, tokens, heads, D)."""
        function = getattr(package(module), name)

        def run(qkv) -> Tensor:
            n, packed, h, w = qkv.shape
            q, k, v = qkv.permute(0, 2, 3, 1).reshape(n, h * w, heads, packed // (3 * heads), 3).unbind(4)
            y = function(q.contiguous(), k.contiguous(), v.contiguous())
            return y.reshape(n, h, w, packed // 3).permute(0, 3, 1, 2)

        return run

    extra = {}
    if device.type == "cuda":
        extra["xformers"] = partial(tokens_first, "xformers.ops", "memory_efficient_attention")
        if dtype != torch.float32:
            extra["flash_attn"] = partial(tokens_first, "flash_attn", "flash_attn_func")
    return Problem(
        attention.OPERATOR,
        {"qkv": qkv},
        partial(attention.attention, num_heads=heads),
        partial(attention.attention_ref, num_heads=heads),
        official=official,
        definition=partial(attention.attention_formula, num_heads=heads),
        differentiable=("qkv",),
        extra=extra,
    )


def conv_problem(layer: ConvCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A frozen convolution with its activation; the gradient of the input alone is wanted."""
    weight = torch.randn(layer.size, device=device, dtype=dtype) / math.sqrt(math.prod(layer.size[1:]))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(layer.size[0], device=device, dtype=dtype)
    inputs = {"x": _map(batch, layer.channels, layer.resolution, dtype, device), "weight": weight, "bias": bias}
    geometry = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}

    def stock(x, weight, bias) -> Tensor:
        y = F.conv2d(x, weight, bias, **geometry)
        return F.relu_(y) if layer.activation == "relu" else F.relu6(y, inplace=True)

    ours = partial(frozen_conv2d_relu.frozen_conv2d_relu, **geometry, activation=layer.activation)

    # backward needs the weight, and of each output whether it was cut off: a bit
    mask = -(-batch * layer.size[0] * layer.output_side**2 // 8)
    saved = weight.numel() * weight.element_size() + 2 * mask
    options = {"differentiable": ("x",), "saved_bytes": saved}
    if device.type == "cuda" and layer.activation == "relu":
        options["undifferentiable"] = {"cudnn_convolution_relu": _tried(partial(cudnn_convolution_relu, layer))}
    return Problem(frozen_conv2d_relu.OPERATOR, inputs, _tried(ours), _tried(stock), **options)


def _tried(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, whose convolutions cuDNN chooses by trials, as in training; not those of a float64 reference."""

    @functools.wraps(function)
    def call(x: Tensor, *args, **options) -> Tensor:
        with tf32(None, trials=x.dtype != torch.float64):
            return function(x, *args, **options)

    return call


def cudnn_convolution_relu(layer: ConvCall, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuDNN's convolution with bias and ReLU in one operation, which has no gradient."""
    return torch.cudnn_convolution_relu(x, weight, bias, [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups)


def pool_problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Max pooling over 2x2 windows."""
    x = _map(batch, layer.channels, layer.resolution, dtype, device)
    stock = lambda x: F.max_pool2d(x, 2)
    # backward needs the place of each maximum, one byte per output
    options = {"differentiable": ("x",), "saved_bytes": 2 * (x.numel() // 4)}
    return Problem(max_pool2x2.OPERATOR, {"x": x}, max_pool2x2.max_pool2x2, stock, **options)


def by_definition(name: str, parameters: Sequence[str] = ()) -> Callable[..., Problem]:
    """What makes a Problem of `gdd_fast.ops.<name>`, called with a map x and a vector of C numbers for each of
    `parameters`; the peers are its own definition."""
    module = importlib.import_module(f"gdd_fast.ops.{name}")
    function, definition = getattr(module, name), getattr(module, f"{name}_ref")

    def problem(layer: MapCall, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        inputs = {"x": _map(batch, layer.channels, layer.resolution, dtype, device)}
        inputs |= {name: torch.randn(layer.channels, device=device, dtype=dtype) for name in parameters}
        ours = lambda *, backend, **given: function(*given.values(), backend=backend)
        plain = lambda **given: definition(*given.values())
        return Problem(module.OPERATOR, inputs, ours, plain, differentiable=tuple(inputs))

    return problem


def _map(n: int, c: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random and channels_last, which everything but the peer official reads."""
    x = torch.randn((n, c, side, side), device=device)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
