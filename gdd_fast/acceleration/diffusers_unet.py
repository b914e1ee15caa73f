"""diffusers' UNet2DModel and everything else built from its blocks. diffusers itself is not imported.

    ResnetBlock2D                       `group_norm_silu`, `residual`
    Attention                           one product for query, key and value; its norm reads the image in place
    FirUpsample2D, FirDownsample2D      `resample2d`

A block is recognised by its class's forward, which must be diffusers' own, and by a trial, which reveals a version of
diffusers that computes differently. Convolutions are handled by `frozen`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.acceleration.blocks import kinds, normalise, scaled_sum, unchanged
from gdd_fast.acceleration.class_exchange import Fast, library_class
from gdd_fast.acceleration.replacements import Decisions
from gdd_fast.backend import Backend
from gdd_fast.layers.convolution import resample_kernel
from gdd_fast.ops import group_norm_silu, resample2d, residual

SIZE = 8  # of the images in trials


def decide(decisions: Decisions) -> None:
    """Decide about every diffusers block in the network."""
    deciders = {
        library_class("diffusers.models.resnet", "ResnetBlock2D"): _decide_resnet,
        library_class("diffusers.models.attention_processor", "Attention"): _decide_attention,
        library_class("diffusers.models.upsampling", "FirUpsample2D"): _decide_fir,
        library_class("diffusers.models.downsampling", "FirDownsample2D"): _decide_fir,
    }
    deciders.pop(None, None)
    for module in decisions.names:
        for known, decider in deciders.items():
            if isinstance(module, known) and decisions.undecided(module):
                if type(module).forward is known.forward:
                    decider(decisions, module)
                else:
                    decisions.leave(module, "its class has a forward of its own")


# --- residual blocks


@dataclass
class BlockState:
    """The backends of a block's operators, and the children that are not called."""

    norm: Backend | None
    residual: Backend | None
    passed_over: Mapping[str, type[nn.Module]]


class FastResnet(Fast):
    """diffusers' residual block."""

    _gdd_fast: BlockState

    def fast_forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        state, x = self._gdd_fast, input_tensor
        unusual = args or kwargs or x.dim() != 4 or (temb is None) != (self.time_emb_proj is None)
        if unusual or not unchanged(self, state.passed_over):
            return super().forward(input_tensor, temb, *args, **kwargs)
        h = normalise(self.norm1, x, state.norm)
        sample = self.upsample if self.upsample is not None else self.downsample
        if sample is not None:
            x, h = sample(x), sample(h)
        h = self.conv1(h)
        embedded = {}
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            embedded = {"add": temb}
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
                embedded = {"scale": scale, "shift": shift}
        h = self.conv2(self.dropout(normalise(self.norm2, h, state.norm, **embedded)))
        if self.conv_shortcut is not None:
            # when training, diffusers first makes channels_last maps contiguous: a copy that would be kept for backward
            x = self.conv_shortcut(x)
        return scaled_sum(x, h, 1 / float(self.output_scale_factor), state.residual)


def _decide_resnet(decisions: Decisions, block: nn.Module) -> None:
    norm = decisions.backend_of(group_norm_silu.OPERATOR)
    parts = kinds(block, "norm1", "norm2", "nonlinearity")
    if norm is None:
        decisions.leave(block, decisions.missing(group_norm_silu.OPERATOR))
        return
    if parts != {"norm1": nn.GroupNorm, "norm2": nn.GroupNorm, "nonlinearity": nn.SiLU}:
        decisions.leave(block, "it normalises or activates otherwise than by GroupNorm and SiLU")
        return
    state = BlockState(norm, decisions.backend_of(residual.OPERATOR), parts)

    def inputs(generator: torch.Generator) -> Iterator[Tensor | None]:
        yield torch.randn(2, block.in_channels, SIZE, SIZE, generator=generator)
        proj = block.time_emb_proj  # None in autoencoders, whose blocks are called with None as embedding
        yield None if proj is None else torch.randn(2, proj.in_features, generator=generator)

    sampling = (type(block.upsample), type(block.downsample))
    options = (block.time_embedding_norm, block.skip_time_act, block.output_scale_factor, block.time_emb_proj is None)
    like = (*options, sampling, block.conv_shortcut is None)
    if decisions.try_to_replace(block, FastResnet, state, "group_norm_silu and residual", inputs, like):
        decisions.absorb(block.norm1, block.norm2, block.nonlinearity)


# --- attention


def _packed(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The concatenated weights and biases of query, key and value, concatenated anew in every call."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers]), bias


@dataclass
class AttentionState:
    """As BlockState, plus the class of the processor, which users may replace."""

    norm: Backend | None
    residual: Backend | None
    passed_over: Mapping[str, type[nn.Module]]
    processor: type


class FastAttention(Fast):
    """diffusers' self-attention over the pixels of an image."""

    _gdd_fast: AttentionState

    def fast_forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state, x = self._gdd_fast, hidden_states
        plain = encoder_hidden_states is None and attention_mask is None and kwargs.keys() <= {"temb"}
        expected = type(self.processor) is state.processor and unchanged(self, state.passed_over)
        if not (plain and expected) or x.dim() != 4:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        n, _, height, width = x.shape
        tokens = normalise(self.group_norm, x, state.norm, activation=None).flatten(2).transpose(1, 2)
        qkv = F.linear(tokens, *_packed(self.to_q, self.to_k, self.to_v))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.to_out[1](self.to_out[0](y)).transpose(1, 2).reshape(n, -1, height, width)
        scale = 1 / float(self.rescale_output_factor)
        if self.residual_connection:
            return scaled_sum(y, x, scale, state.residual)
        return y if scale == 1 else y * scale


_LAYERS = {"group_norm": nn.GroupNorm, "to_q": nn.Linear, "to_k": nn.Linear, "to_v": nn.Linear}


def attention_obstacle(block: nn.Module) -> str | None:
    """Why a diffusers Attention is not plain self-attention over pixels with one normalisation; None if it is."""
    absent = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "add_q_proj")
    if type(block.processor) is not library_class("diffusers.models.attention_processor", "AttnProcessor2_0"):
        return "its processor is not diffusers' scaled_dot_product_attention"
    if any(getattr(block, name, None) is not None for name in absent) or block.is_cross_attention:
        return "it attends to something other than the image's own pixels, or normalises more than once"
    if kinds(block, *_LAYERS) != _LAYERS or len({getattr(block, f"to_{name}").weight.shape for name in "qkv"}) > 1:
        return "it is not made of a GroupNorm and three Linear layers of one size"
    return None


def _decide_attention(decisions: Decisions, block: nn.Module) -> None:
    reason = attention_obstacle(block)
    if reason is not None:
        decisions.leave(block, reason)
        return
    parts = kinds(block, *_LAYERS)
    norm = decisions.backend_of(group_norm_silu.OPERATOR)
    state = AttentionState(norm, decisions.backend_of(residual.OPERATOR), parts, type(block.processor))
    inputs = lambda generator: [torch.randn(2, block.query_dim, SIZE, SIZE, generator=generator)]
    like = (block.heads > 1, block.residual_connection, block.rescale_output_factor, block.to_q.bias is None)
    note = "one product for query, key and value; its norm reads the image in place"
    if decisions.try_to_replace(block, FastAttention, state, note, inputs, like):
        decisions.absorb(*(block._modules[name] for name in parts))


# --- filters


@dataclass
class FilterState:
    """The normalised filter, on the device where it was last used."""

    kernel: Tensor
    backend: Backend
    up: bool


class FastFir(Fast):
    """diffusers' up- and downsampling by a short filter."""

    _gdd_fast: FilterState

    def fast_forward(self, hidden_states: Tensor) -> Tensor:
        state, x = self._gdd_fast, hidden_states
        if state.kernel.device != x.device:
            state.kernel = state.kernel.to(x.device)
        padding = state.kernel.shape[-1] // 2 - 1
        return resample2d.resample2d(x, state.kernel, up=state.up, padding=padding, backend=state.backend)


def _decide_fir(decisions: Decisions, module: nn.Module) -> None:
    backend = decisions.backend_of(resample2d.OPERATOR)
    taps = tuple(module.fir_kernel)
    if module.use_conv:
        decisions.leave(module, "it filters and convolves in one operation")
    elif len(taps) % 2 or taps != taps[::-1]:
        decisions.leave(module, "its filter is not symmetric with an even number of taps")
    elif backend is None:
        decisions.leave(module, decisions.missing(resample2d.OPERATOR))
    else:
        up = isinstance(module, library_class("diffusers.models.upsampling", "FirUpsample2D") or ())
        state = FilterState(resample_kernel(taps), backend, up)
        inputs = lambda generator: [torch.randn(2, 3, SIZE, SIZE, generator=generator)]
        decisions.try_to_replace(module, FastFir, state, "resample2d", inputs, (up, taps))
