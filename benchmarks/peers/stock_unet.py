"""EDM's U-Nets on PyTorch's own operators, as one would write them without this library: what ours is compared with.

`StockUNet(net, style)` takes the weights of one of our networks, shared and not copied, and computes the same function
with `torch.nn.functional` alone: concatenated skips, group norm and SiLU one after the other, depthwise convolutions
for resampling. NCSN++ with its residual encoder and ADM are covered, which are what the presets train.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Linear
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.models.unet_block import UNetBlock


@dataclass(frozen=True)
class Style:
    """What differs between the public code's settings and the best that plain PyTorch offers.

    wide_norm: group norm in float32 between two casts; else in the activations' type (statistics are float32 anyway).
    sdpa: PyTorch's fused attention; else two products around a float32 softmax.
    box: averages and repeats pixels where the filter is 2x2; else depthwise convolutions for every filter.
    """

    wide_norm: bool
    sdpa: bool
    box: bool


OFFICIAL = Style(wide_norm=True, sdpa=False, box=False)
BEST = Style(wide_norm=False, sdpa=True, box=True)


class StockGenerator(nn.Module):
    """GDD's preconditioning around a `StockUNet`: `net(x, sigma, labels)` -> float32 (N, C, H, W)."""

    def __init__(self, net: GDDPrecond, style: Style, dtype: torch.dtype) -> None:
        super().__init__()
        self.img_channels, self.img_resolution, self.label_dim = net.img_channels, net.img_resolution, net.label_dim
        self.sigma_data, self.sigma_eps, self.dtype = net.sigma_data, net.sigma_eps, dtype
        self.model = StockUNet(net.model, style)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma, variance = sigma.reshape(-1, 1, 1, 1), self.sigma_data**2
        offset = sigma - self.sigma_eps
        c_skip = variance / (offset.square() + variance)
        c_out = offset * self.sigma_data / (sigma.square() + variance).sqrt()
        c_in = 1 / (sigma.square() + variance).sqrt()
        f = self.model((c_in * x).to(self.dtype), (sigma.log() / 4).flatten(), labels)
        return c_skip * x + c_out * f.float()


class StockUNet(nn.Module):
    """The U-Net of `model`, a SongUNet or DhariwalUNet of ours, on plain PyTorch; `x` decides the compute type."""

    def __init__(self, model: nn.Module, style: Style) -> None:
        super().__init__()
        self.map_noise = model.map_noise
        self.map_layer0, self.map_layer1 = StockLinear(model.map_layer0), StockLinear(model.map_layer1)
        self.map_label = None if model.map_label is None else StockLinear(model.map_label)
        self.adm = hasattr(model, "out_norm")
        self.enc = nn.ModuleDict({name: _stock(layer, style) for name, layer in model.enc.items()})
        self.dec = nn.ModuleDict({name: _stock(layer, style) for name, layer in model.dec.items()})
        if self.adm:
            self.out_norm, self.out_conv = StockNorm(model.out_norm, style), StockConv(model.out_conv, style)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self._embed(noise, labels).to(x.dtype)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = aux = skips[-1] = (skips[-1] + layer(aux)) * math.sqrt(0.5)
                continue
            x = layer(x, emb) if isinstance(layer, StockBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, StockBlock):
                x = layer(torch.cat([x, skips.pop()], 1) if layer.in_channels != x.shape[1] else x, emb)
            else:  # the last norm, with its SiLU, and the last convolution
                x = layer(x)
        return self.out_conv(self.out_norm(x)) if self.adm else x

    def _embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise)
        if self.map_label is not None:
            labels = torch.zeros(1, self.map_label.weight.shape[1], device=emb.device) if labels is None else labels
        if self.adm:
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            return F.silu(emb if self.map_label is None else emb + self.map_label(labels))
        if self.map_label is not None:
            emb = emb + self.map_label(labels * math.sqrt(labels.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class StockBlock(nn.Module):
    """One residual block."""

    def __init__(self, block: UNetBlock, style: Style) -> None:
        super().__init__()
        self.in_channels, self.num_heads, self.sdpa = block.in_channels, block.num_heads, style.sdpa
        self.skip_scale, self.adaptive_scale = block.skip_scale, block.adaptive_scale
        self.norm0, self.norm1 = StockNorm(block.norm0, style), StockNorm(block.norm1, style, activate=False)
        self.conv0, self.conv1 = StockConv(block.conv0, style), StockConv(block.conv1, style)
        self.affine = StockLinear(block.affine)
        self.skip = None if block.skip is None else StockConv(block.skip, style)
        if block.num_heads:
            self.norm2 = StockNorm(block.norm2, style, activate=False)
            self.qkv, self.proj = StockConv(block.qkv, style), StockConv(block.proj, style)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.norm0(x))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, 1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + params))
        x = x if self.skip is None else self.skip(x)
        x = self._add(self.conv1(h), x)
        if self.num_heads:
            x = self._add(self.proj(self._attend(self.qkv(self.norm2(x)))), x)
        return x

    def _add(self, h: Tensor, x: Tensor) -> Tensor:
        y = h + x
        return y if self.skip_scale == 1 else y * self.skip_scale

    def _attend(self, qkv: Tensor) -> Tensor:
        n, packed, height, width = qkv.shape
        dim = packed // (3 * self.num_heads)
        split = qkv.reshape(n, self.num_heads, dim, 3, height * width)
        if self.sdpa:
            q, k, v = split.permute(3, 0, 1, 4, 2)
            y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            q, k, v = split.permute(3, 0, 1, 2, 4).flatten(1, 2)
            logits = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(dim)).float())
            y = torch.einsum("nqk,nck->ncq", logits.softmax(2).to(v.dtype), v)
        return y.reshape(n, packed // 3, height, width)


class StockConv(nn.Module):
    """Convolution with an optional depthwise filter around it; weights are cast to the input's type at every call."""

    def __init__(self, layer: Conv2d, style: Style) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.up, self.down, self.conv_first = layer.up, layer.down, layer.conv_first
        self.padding, self.border = layer.padding, layer.border
        self.box = style.box and layer.box
        self.register_buffer("resample_filter", layer.resample_filter)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv_first:
            return self._filter(self._convolve(x, self.padding + self.border), padding=0)
        if self.up or self.down:
            x = self._filter(x, self.border)
        return x if self.weight is None else self._convolve(x, self.padding)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)

    def _filter(self, x: Tensor, padding: int) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).repeat(channels, 1, 1, 1)
        if self.up:
            return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=padding)
        return F.conv2d(x, taps, groups=channels, stride=2, padding=padding)


class StockNorm(nn.Module):
    """Group norm, with its SiLU if `activate`."""

    def __init__(self, layer: GroupNorm, style: Style, *, activate: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.num_groups, self.eps = layer.weight, layer.bias, layer.num_groups, layer.eps
        self.wide, self.activate = style.wide_norm, activate

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.float32 if self.wide else x.dtype
        y = F.group_norm(x.to(kind), self.num_groups, self.weight.to(kind), self.bias.to(kind), self.eps).to(x.dtype)
        return F.silu(y) if self.activate else y


class StockLinear(nn.Module):
    """x @ weight.T + bias in the type of x."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _stock(layer: nn.Module, style: Style) -> nn.Module:
    match layer:
        case UNetBlock():
            return StockBlock(layer, style)
        case GroupNorm():
            return StockNorm(layer, style)
        case Conv2d():
            return StockConv(layer, style)
    raise TypeError(f"no plain counterpart of {type(layer).__name__}")
