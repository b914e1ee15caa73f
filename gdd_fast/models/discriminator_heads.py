"""The trainable part of the projected discriminator: one small convolutional head for each feature map."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.errors import ConfigError
from gdd_fast.layers.spectral_conv import SpectralConv2d

CHANNELS = {1: 2048, 2: 1024, 4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 64, 256: 32, 512: 16}
CLASS_MAP_CHANNELS = 64
LEARNED_EMBEDDING_DIM = 320


class DiscriminatorHeads(nn.Module):
    """One head for each map of each backbone (StyleGAN-XL's multi-scale discriminators, arXiv 2202.00273).

    `channels` and `resolutions` are those of `ProjectedFeatures`. Convolutions compute in `dtype`; parameters, batch
    statistics and logits stay float32. `width` scales the channels of every convolution: 1 is the paper's; 0.25 takes a
    tenth of the arithmetic.

    With `label_dim`, logits are inner products with a projection of the class's row in a table that all heads share.
    `embedding` is that table, frozen: at least `label_dim` rows (the first are used) of any width, scaled as a whole to
    mean 0 and standard deviation 1. None learns a table from scratch. With `tables_per_head`, each head learns a table
    of its own, starting from the first rows of `embedding`, unscaled, or at random. With `spectral_random`, spectral
    norms start from random vectors instead of ones that torch has iterated 15 times.

    Raises `ConfigError` for resolutions that are not powers of two up to 512, or a width or table that cannot be.
    """

    def __init__(
        self,
        channels: Sequence[Sequence[int]],
        resolutions: Sequence[Sequence[int]],
        label_dim: int = 0,
        embedding: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        width: float = 1.0,
        tables_per_head: bool = False,
        spectral_random: bool = False,
    ):
        super().__init__()
        if width <= 0:
            raise ConfigError(f"the width of the discriminator heads must be positive, not {width}")
        self.label_dim = label_dim
        self.dtype = dtype
        table = _class_table(label_dim, embedding)
        embedding_dim = None if table is None else table.embedding_dim
        self.embedding = None if tables_per_head else table
        own_rows = label_dim if tables_per_head else 0
        own = embedding[:label_dim].float() if tables_per_head and embedding is not None else None
        self.heads = nn.ModuleList(
            nn.ModuleList(
                Head(in_channels, size, min(sizes[-1], 8), embedding_dim, width, own_rows, spectral_random, own)
                for in_channels, size in zip(level_channels, sizes, strict=True)
            )
            for level_channels, sizes in zip(channels, resolutions, strict=True)
        )

    def forward(self, features: Sequence[Sequence[Tensor]], labels: Tensor | None = None) -> list[list[Tensor]]:
        """Maps of `ProjectedFeatures` and one-hot `(N, label_dim)` -> logits `(N, positions)` per map, float32."""
        embedded = None
        if self.label_dim:
            if labels is None or labels.ndim != 2 or labels.shape[1] != self.label_dim:
                given = "none" if labels is None else tuple(labels.shape)
                raise ConfigError(f"this discriminator takes one-hot labels (N, {self.label_dim}), not {given}")
            classes = labels.argmax(1)
            embedded = classes if self.embedding is None else self.embedding(classes)
        return [
            [head(x.to(self.dtype), embedded) for head, x in zip(heads, maps, strict=True)]  # type: ignore[call-overload]
            for heads, maps in zip(self.heads, features, strict=True)
        ]


class Head(nn.Module):
    """Strided convolutions from `start` down to `end`, then one to logits; nominal sizes, both powers of two.

    With `own_rows` it has a class table of its own and takes classes instead of their rows; that table starts from
    `own_table` (own_rows, embedding_dim).
    """

    def __init__(
        self,
        in_channels: int,
        start: int,
        end: int,
        embedding_dim: int | None = None,
        width: float = 1.0,
        own_rows: int = 0,
        spectral_random: bool = False,
        own_table: Tensor | None = None,
    ):
        super().__init__()
        if start not in CHANNELS or end not in CHANNELS or start < end:
            raise ConfigError(f"a discriminator head goes down in powers of two up to 512, not from {start} to {end}")
        layers: list[nn.Module] = []
        channels = in_channels
        for level in range(start.bit_length() - 1, end.bit_length() - 1, -1):
            out_channels = max(1, round(CHANNELS[1 << level - 1] * width))
            layers += [
                SpectralConv2d.make(channels, out_channels, 4, stride=2, padding=1, random=spectral_random),
                _BatchNorm(out_channels),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = out_channels
        self.main = nn.Sequential(*layers)
        kernel = 4 if end >= 8 else max(1, end // 2)
        out_channels = 1 if embedding_dim is None else CLASS_MAP_CHANNELS
        self.out = SpectralConv2d.make(channels, out_channels, kernel, bias=False, random=spectral_random)
        self.embedding = nn.Embedding(own_rows, embedding_dim) if own_rows and embedding_dim else None
        if self.embedding is not None and own_table is not None:
            self.embedding.weight.data.copy_(own_table)
        self.class_map = None if embedding_dim is None else ClassMap(embedding_dim, CLASS_MAP_CHANNELS)

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Map `(N, C, h, w)`, embedded classes `(N, embedding_dim)`, or int64 `(N,)` -> logits `(N, positions)`."""
        x = self.out(self.main(x)).flatten(2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.class_map is None:
            return x.squeeze(1)
        if self.embedding is not None:
            embedded = self.embedding(embedded)
        return (x * self.class_map(embedded).unsqueeze(2)).sum(1) / math.sqrt(CLASS_MAP_CHANNELS)


class _BatchNorm(nn.BatchNorm2d):
    """Normalises by the batch in training, without updating the running statistics.

    Heads are trained and thrown away: nothing reads these statistics. A single batch with a non-finite value would make
    them NaN for good, in every later checkpoint, even though its step is skipped.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not (self.running_mean + self.running_var).isfinite().all():  # type: ignore[operator]
            self.reset_running_stats()  # from a run that started before this class existed


class ClassMap(nn.Module):
    """A linear layer as in StyleGAN2: unit-normal weight scaled by 1/sqrt(fan-in), leaky ReLU with gain sqrt(2)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _class_table(label_dim: int, embedding: Tensor | None) -> nn.Embedding | None:
    if label_dim == 0:
        if embedding is not None:
            raise ConfigError("a class embedding has no use without labels: leave it out or set label_dim")
        return None
    if embedding is None:
        return nn.Embedding(label_dim, LEARNED_EMBEDDING_DIM)
    if embedding.ndim != 2 or embedding.shape[0] < label_dim:
        raise ConfigError(f"a class embedding for {label_dim} classes cannot have shape {tuple(embedding.shape)}")
    table = embedding.detach().float()
    table = (table - table.mean()) / table.std()
    return nn.Embedding.from_pretrained(table[:label_dim].clone(), freeze=True)
