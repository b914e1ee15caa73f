"""NCSN++ and DDPM++: Song et al., arXiv 2011.13456, as configured by Karras et al., arXiv 2206.00364 (EDM)."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.convolution import Conv2d
from gdd_fast.layers.embedding import FourierEmbedding, PositionalEmbedding
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Init, Linear
from gdd_fast.models.arguments import check_choice, check_filter, check_probabilities, check_resolutions, check_sizes
from gdd_fast.models.unet import EDMUNet, drop_labels, size_name
from gdd_fast.models.unet_block import UNetBlock


class SongUNet(EDMUNet):
    """NCSN++ and DDPM++. The defaults are DDPM++'s; `ncsnpp()` and `ddpmpp()` give EDM's two sets of arguments.

    Args (EDM's names):
        img_resolution, in_channels, out_channels: side of the images, and channels of input and output. label_dim:
        number of classes; 0: none. augment_dim: size of the augmentation labels in EDM's training; 0: none.
        model_channels, channel_mult, num_blocks: base width, its multiplier per resolution, blocks per resolution.
        channel_mult_emb, channel_mult_noise: multipliers for the widths of the embedding and of the noise embedding.
        attn_resolutions: resolutions with self-attention (one head). dropout, label_dropout: probabilities, in training
        mode only. embedding_type: "positional" | "fourier". encoder_type: "standard" | "skip" | "residual".
        decoder_type: "standard" | "skip". resample_filter: taps of the up- and downsampling filter.

    Raises ConfigError for arguments that cannot make a network.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution,
            channel_mult,
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            channel_mult_noise=channel_mult_noise,
            num_blocks=num_blocks,
            label_dim=label_dim,
            augment_dim=augment_dim,
        )
        check_resolutions(attn_resolutions)
        check_probabilities(dropout=dropout, label_dropout=label_dropout)
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        check_filter(resample_filter)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = Init("xavier_uniform")
        init_zero = Init("xavier_uniform", weight=1e-5)

        def block(cin: int, cout: int, *, attend: bool = False, **sampling: bool) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                num_heads=int(attend),
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                init=init,
                init_zero=init_zero,
                init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)),
                **sampling,
            )

        self.map_noise: nn.Module
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True, sin_first=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels, sin_first=True)
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.enc = nn.ModuleDict()
        channels, aux_channels = model_channels, in_channels
        skips = []
        for level, mult in enumerate(channel_mult):
            size = size_name(img_resolution, level)
            if level == 0:
                self.enc[f"{size}_conv"] = Conv2d(in_channels, channels, 3, init=init)
            else:
                self.enc[f"{size}_down"] = block(channels, channels, down=True)
                aux: dict[str, Any] = {"down": True, "resample_filter": resample_filter}
                if encoder_type == "skip":
                    self.enc[f"{size}_aux_down"] = Conv2d(aux_channels, aux_channels, 0, **aux)
                    self.enc[f"{size}_aux_skip"] = Conv2d(aux_channels, channels, 1, init=init)
                elif encoder_type == "residual":
                    self.enc[f"{size}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, **aux, conv_first=True, init=init
                    )
                    aux_channels = channels
            skips.append(channels)
            for index in range(num_blocks):
                cin, channels = channels, model_channels * mult
                attend = img_resolution >> level in attn_resolutions
                self.enc[f"{size}_block{index}"] = block(cin, channels, attend=attend)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = size_name(img_resolution, level)
            if level == last:
                self.dec[f"{size}_in0"] = block(channels, channels, attend=True)
                self.dec[f"{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                cin, channels = channels + skips.pop(), model_channels * mult
                attend = index == num_blocks and img_resolution >> level in attn_resolutions
                self.dec[f"{size}_block{index}"] = block(cin, channels, attend=attend)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{size}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{size}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{size}_aux_conv"] = Conv2d(channels, out_channels, 3, init=init_zero)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, *, batch: int
    ) -> Tensor:
        """The conditioning of every block, float32 (N or 1, emb_channels)."""
        emb = self.map_noise(noise_labels)
        if self.map_label is not None:
            labels = drop_labels(class_labels, self.label_dropout, batch) if self.training else class_labels
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))  # type: ignore[operator]
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
