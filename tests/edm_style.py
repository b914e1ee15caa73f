"""A small U-Net with the layers, attributes and parameter names of EDM's own code, written for these tests.

EDM's classes come with its pickles; `accelerate` knows them by what is here: attributes, names and what they compute.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t() + self.bias.to(x.dtype)


class FourierEmbedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, x: Tensor) -> Tensor:
        phase = x.outer((2 * torch.pi * self.freqs).to(x.dtype))
        return torch.cat([phase.cos(), phase.sin()], 1)


class Conv2d(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, *, up=False, down=False, taps=(1, 1), fused_resample=False):
        super().__init__()
        self.in_channels, self.out_channels = cin, cout
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.weight = (
            nn.Parameter(torch.randn(cout, cin, kernel, kernel) / (cin * kernel**2) ** 0.5) if kernel else None
        )
        self.bias = nn.Parameter(torch.randn(cout) / 4) if kernel else None
        row = torch.tensor(taps, dtype=torch.float32)
        filter2d = torch.outer(row, row)[None, None] / row.sum() ** 2
        self.register_buffer("resample_filter", filter2d if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.resample_filter
        border = 0 if taps is None else taps.shape[-1] // 2 - 1
        reach = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.fused_resample:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=reach + border)
            x = self._filter(x, F.conv2d, 1, 0)
        else:
            if self.up:
                x = self._filter(x, F.conv_transpose2d, 4, border)
            if self.down:
                x = self._filter(x, F.conv2d, 1, border)
            if self.weight is not None:
                x = F.conv2d(x, self.weight.to(x.dtype), padding=reach)
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]

    def _filter(self, x: Tensor, convolve, gain: int, padding: int) -> Tensor:
        weight = (self.resample_filter * gain).to(x.dtype).repeat(x.shape[1], 1, 1, 1)
        return convolve(x, weight, stride=2, padding=padding, groups=x.shape[1])


class GroupNorm(nn.Module):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(1 + torch.randn(channels) / 4)
        self.bias = nn.Parameter(torch.randn(channels) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    def __init__(
        self, cin, cout, emb, *, up=False, down=False, heads=0, adaptive_scale=False, taps=(1, 1), dropout=0.1
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads = cin, cout, heads
        self.dropout, self.adaptive_scale = dropout, adaptive_scale
        self.skip_scale = 1 if adaptive_scale else 0.5**0.5
        sampling = {"up": up, "down": down, "taps": taps}
        self.norm0 = GroupNorm(cin, 1e-6)
        self.conv0 = Conv2d(cin, cout, 3, **sampling)
        self.affine = Linear(emb, cout * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(cout, 1e-6)
        self.conv1 = Conv2d(cout, cout, 3)
        self.skip = None
        if cin != cout or up or down:
            self.skip = Conv2d(cin, cout, int(cin != cout), **sampling)
        if heads:
            self.norm2 = GroupNorm(cout, 1e-6)
            self.qkv = Conv2d(cout, cout * 3, 1)
            self.proj = Conv2d(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        embedded = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = embedded.chunk(2, 1)
            h = F.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = F.silu(self.norm1(h + embedded))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            qkv = self.qkv(self.norm2(x))
            q, k, v = qkv.reshape(len(x) * self.num_heads, x.shape[1] // self.num_heads, 3, -1).unbind(2)
            weights = (q.transpose(1, 2) @ k / k.shape[1] ** 0.5).softmax(2)
            x = (self.proj((v @ weights.transpose(1, 2)).reshape(x.shape)) + x) * self.skip_scale
        return x


class UNet(nn.Module):
    """Blocks of every kind, a skip that is concatenated, and NCSN++'s convolution under a common border."""

    def __init__(self, *, adaptive_scale: bool = False, taps=(1, 3, 3, 1), channels: int = 32) -> None:
        super().__init__()
        options = {"adaptive_scale": adaptive_scale, "taps": taps}
        c, emb = channels, 24
        self.map_noise = FourierEmbedding(16)
        self.map = Linear(16, emb)
        self.enc = nn.ModuleDict(
            {
                "16x16_conv": Conv2d(3, c, 3),
                "16x16_block0": UNetBlock(c, c, emb, **options),
                "8x8_down": UNetBlock(c, c, emb, down=True, **options),
                "8x8_aux_residual": Conv2d(3, c, 3, down=True, taps=taps, fused_resample=True),
                "8x8_block0": UNetBlock(c, 2 * c, emb, heads=2, **options),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "16x16_up": UNetBlock(2 * c, 2 * c, emb, up=True, **options),
                "16x16_block0": UNetBlock(3 * c, c, emb, **options),
            }
        )
        self.out_norm = GroupNorm(c, 1e-6)
        self.out_conv = Conv2d(c, 3, 3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        emb = F.silu(self.map(self.map_noise(sigma.log() / 4)))
        skip = self.enc["16x16_block0"](self.enc["16x16_conv"](x), emb)
        h = self.enc["8x8_down"](skip, emb) + self.enc["8x8_aux_residual"](x)
        h = self.dec["16x16_up"](self.enc["8x8_block0"](h, emb), emb)
        h = self.dec["16x16_block0"](torch.cat([h, skip], 1), emb)
        return self.out_conv(F.silu(self.out_norm(h)))
