"""ADM: Dhariwal & Nichol, arXiv 2105.05233, as configured by Karras et al., arXiv 2206.00364 (EDM)."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.embedding import PositionalEmbedding
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Init, Linear
from gdd_fast.models.arguments import check_probabilities, check_resolutions, check_sizes
from gdd_fast.models.unet import EDMUNet, drop_labels, size_name
from gdd_fast.models.unet_block import UNetBlock


class DhariwalUNet(EDMUNet):
    """ADM. Arguments and errors as in `SongUNet`; attention has heads of 64 channels (none below that, as in EDM)."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution,
            channel_mult,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            label_dim=label_dim,
            augment_dim=augment_dim,
        )
        check_resolutions(attn_resolutions)
        check_probabilities(dropout=dropout, label_dropout=label_dropout)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0.0)

        def block(cin: int, cout: int, *, attend: bool = False, **sampling: Any) -> UNetBlock:
            heads = cout // 64 if attend else 0
            return UNetBlock(
                cin, cout, emb_channels, num_heads=heads, dropout=dropout, init=init, init_zero=init_zero, **sampling
            )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        init_label = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=init_label) if label_dim else None

        self.enc = nn.ModuleDict()
        channels = model_channels * channel_mult[0]
        skips = []
        for level, mult in enumerate(channel_mult):
            size = size_name(img_resolution, level)
            if level == 0:
                self.enc[f"{size}_conv"] = Conv2d(in_channels, channels, 3, init=init)
            else:
                self.enc[f"{size}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for index in range(num_blocks):
                cin, channels = channels, model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.enc[f"{size}_block{index}"] = block(cin, channels, attend=attend)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = size_name(img_resolution, level)
            if level == len(channel_mult) - 1:
                self.dec[f"{size}_in0"] = block(channels, channels, attend=True)
                self.dec[f"{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                cin, channels = channels + skips.pop(), model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.dec[f"{size}_block{index}"] = block(cin, channels, attend=attend)
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, out_channels, 3, init=init_zero)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, *, batch: int
    ) -> Tensor:
        """The conditioning of every block, float32 (N or 1, emb_channels)."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = drop_labels(class_labels, self.label_dropout, batch) if self.training else class_labels
            emb = emb + self.map_label(labels)
        return F.silu(emb)
