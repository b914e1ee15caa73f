"""The U-Nets of EDM and GDD as their own code builds them: NCSN++, DDPM++ and ADM.

Every pickle recreates their classes from source text, so a layer is recognised by its attributes and parameter names,
and by computing the expected result in a trial.

    embedding       keeps its Fourier frequencies in float32 when the network is cast
    convolution     includes its bias, filters by `resample2d`, keeps no input while its weight is frozen
    linear layer    one operator in place of two
    block           `group_norm_silu`, `attention` on the packed qkv, `residual`
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.acceleration.blocks import kinds, normalise, scaled_sum, unchanged
from gdd_fast.acceleration.class_exchange import Fast
from gdd_fast.acceleration.replacements import Decisions
from gdd_fast.backend import Backend
from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.embedding import FourierEmbedding, KeepsFrequencies
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Linear
from gdd_fast.models.edm import DhariwalUNet, SongUNet
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ops import attention, group_norm_silu, residual
from gdd_fast.ops._memory_format import autocast_dtype, memory_format
from gdd_fast.ops.frozen_conv2d import converted, frozen_conv2d
from gdd_fast.ops.resample2d import OPERATOR as RESAMPLE
from gdd_fast.ops.resample2d import resample2d

OURS = (Conv2d, FourierEmbedding, GroupNorm, Linear, UNetBlock, SongUNet, DhariwalUNet)
SIZE = 8  # of the images in trials


def decide(decisions: Decisions) -> None:
    """Decide about every EDM layer and block in the network."""
    for module in decisions.names:
        if isinstance(module, OURS):
            decisions.leave(module, "it is gdd_fast's own and calls the operators itself")
        elif not decisions.undecided(module):
            continue
        elif _is_block(module):
            _decide_block(decisions, module)
        elif _is_conv(module):
            _decide_conv(decisions, module)
        elif _is_linear(module):
            inputs = lambda generator, width=module.in_features: [torch.randn(2, width, generator=generator)]
            decisions.try_to_replace(
                module, FastLinear, None, "one operator in place of two", inputs, module.bias is None
            )
        elif _is_fourier(module):
            inputs = lambda generator: [torch.randn(2, generator=generator)]
            note = "its frequencies stay in float32 when the network is cast"
            decisions.try_to_replace(module, FastFourier, None, note, inputs, ())


class FastFourier(KeepsFrequencies, Fast):
    """EDM's embedding of the noise level by random frequencies."""

    def fast_forward(self, x: Tensor) -> Tensor:
        phase = torch.outer(x, (math.tau * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def _is_fourier(module: nn.Module) -> bool:
    alone = not module._modules and not module._parameters and set(module._buffers) == {"freqs"}
    return alone and module.freqs.dim() == 1 and module.freqs.dtype == torch.float32


class FastLinear(Fast):
    """EDM's linear layer."""

    def fast_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        set(module._parameters) == {"weight", "bias"}
        and not module._modules
        and not isinstance(module, nn.Linear)
        and weight is not None
        and weight.shape == (getattr(module, "out_features", None), getattr(module, "in_features", None))
    )


# --- convolutions


@dataclass
class ConvState:
    """What EDM's convolution needs besides its parameters."""

    backend: Backend


class FastConv(Fast):
    """EDM's convolution with its optional up- or downsampling by two."""

    _gdd_fast: ConvState

    def fast_forward(self, x: Tensor) -> Tensor:
        border = 0 if self.resample_filter is None else self.resample_filter.shape[-1] // 2 - 1
        if self.weight is not None and self.down and self.fused_resample:
            # the padding that the filter needs is added once, before the convolution; the bias is also added there
            x = self._convolve(x, self.weight.shape[-1] // 2 + border, bias_scale=1 / self.resample_filter.sum())
            return self._resample(x, padding=0)
        if self.up or self.down:
            x = self._resample(x, padding=border)
        return x if self.weight is None else self._convolve(x, self.weight.shape[-1] // 2)

    def _resample(self, x: Tensor, padding: int) -> Tensor:
        return resample2d(x, self.resample_filter, up=self.up, padding=padding, backend=self._gdd_fast.backend)

    def _convolve(self, x: Tensor, padding: int, bias_scale: Tensor | None = None) -> Tensor:
        bias = self.bias if self.bias is None or bias_scale is None else self.bias * bias_scale
        bias = None if bias is None else bias.to(x.dtype)
        if self.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
            return F.conv2d(x, self.weight.to(x.dtype), bias, padding=padding)
        weight = converted(self.weight, autocast_dtype(x), memory_format(x))
        return frozen_conv2d(x, weight, bias, padding=padding)


def _is_conv(module: nn.Module) -> bool:
    attributes = ("weight", "bias", "in_channels", "out_channels", "up", "down")
    return (
        module._parameters.keys() <= {"weight", "bias"}
        and not module._modules
        and "resample_filter" in module._buffers
        and all(hasattr(module, name) for name in attributes)
    )


def _decide_conv(decisions: Decisions, conv: nn.Module) -> None:
    taps, fused = conv.resample_filter, getattr(conv, "fused_resample", False)
    if taps is not None and (taps.dim() != 4 or taps.shape[:2] != (1, 1) or taps.shape[-1] % 2):
        decisions.leave(conv, "it resamples with a filter of an odd number of taps")
        return
    if fused and conv.up:
        decisions.leave(conv, "it convolves while upsampling (fused_resample)")
        return
    backend = decisions.backend_of(RESAMPLE)
    frozen = conv.weight is not None and not conv.weight.requires_grad
    notes = ["resamples by resample2d"] if taps is not None and backend is not None else []
    notes += ["includes its bias"] if conv.bias is not None else []
    notes += ["frozen: keeps no input for backward"] if frozen else []
    if not notes:
        decisions.leave(conv, decisions.missing(RESAMPLE))
        return
    taps = () if taps is None else tuple(taps.flatten().tolist())
    kernel = None if conv.weight is None else conv.weight.shape[-1]
    inputs = lambda generator: [torch.randn(2, conv.in_channels, SIZE, SIZE, generator=generator)]
    like = (conv.up, conv.down, fused, taps, kernel, conv.bias is None)
    decisions.try_to_replace(conv, FastConv, ConvState(backend or "torch"), "; ".join(notes), inputs, like)


# --- blocks


@dataclass
class BlockState:
    """The backends of a block's operators, and the children that are not called."""

    norm: Backend | None
    attention: Backend
    residual: Backend | None
    passed_over: Mapping[str, type[nn.Module]]


class FastBlock(Fast):
    """EDM's U-Net block."""

    _gdd_fast: BlockState

    def fast_forward(self, x: Tensor, emb: Tensor) -> Tensor:
        state = self._gdd_fast
        if not unchanged(self, state.passed_over):
            return super().forward(x, emb)
        scale = float(self.skip_scale)
        h = self.conv0(normalise(self.norm0, x, state.norm))
        embedded = self.affine(emb)
        if self.adaptive_scale:
            gain, offset = embedded.chunk(2, dim=1)
            h = normalise(self.norm1, h, state.norm, scale=gain, shift=offset)
        else:
            h = normalise(self.norm1, h, state.norm, add=embedded)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = scaled_sum(h, x if self.skip is None else self.skip(x), scale, state.residual)
        if self.num_heads:
            qkv = self.qkv(normalise(self.norm2, x, state.norm, activation=None))
            x = scaled_sum(
                self.proj(attention.attention(qkv, self.num_heads, backend=state.attention)), x, scale, state.residual
            )
        return x


def _is_block(module: nn.Module) -> bool:
    children = {"norm0", "conv0", "affine", "norm1", "conv1"}
    attributes = ("in_channels", "num_heads", "dropout", "skip_scale", "adaptive_scale")
    return children <= module._modules.keys() and all(hasattr(module, name) for name in attributes)


def _decide_block(decisions: Decisions, block: nn.Module) -> None:
    norm = decisions.backend_of(group_norm_silu.OPERATOR)
    heads = block.num_heads
    if norm is None and not heads:
        decisions.leave(block, decisions.missing(group_norm_silu.OPERATOR))
        return
    norms = kinds(block, "norm0", "norm1", "norm2")
    by = "auto" if decisions.backend == "auto" else decisions.backend_of(attention.OPERATOR)
    state = BlockState(norm, by, decisions.backend_of(residual.OPERATOR), norms)
    parts = ["group_norm_silu and residual"] if norm is not None else []
    parts += ["attention without its matrix of probabilities"] if heads else []

    def inputs(generator: torch.Generator) -> Iterator[Tensor]:
        yield torch.randn(2, block.in_channels, SIZE, SIZE, generator=generator)
        yield torch.randn(2, block.affine.weight.shape[1], generator=generator)

    conv = block.conv0
    sampling = tuple(getattr(conv, name, None) for name in ("up", "down", "fused_resample"))
    head_dim = heads and conv.weight.shape[0] // heads  # kernels exist only for some head widths
    like: Any = (head_dim, block.adaptive_scale, float(block.skip_scale), block.skip is None, sampling)
    if decisions.try_to_replace(block, FastBlock, state, ", ".join(parts), inputs, like):
        decisions.absorb(*(block._modules[name] for name in norms))
