"""The random, frozen mixing of backbone features (Sauer et al., "Projected GANs", arXiv 2111.01007, section 3.2)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.frozen_conv import FrozenConv2d

MIXED_CHANNELS = (64, 128, 256, 512)
OUT_CHANNELS = (64, 64, 128, 256)
REASSEMBLED_CHANNELS = (96, 192, 384, 768)


class Reassemble(nn.Module):
    """Turns four token maps of one size into a pyramid (x4, x2, x1, x1/2), as in DPT (arXiv 2103.13413)."""

    def __init__(self, width: int):
        super().__init__()
        c0, c1, c2, c3 = REASSEMBLED_CHANNELS
        self.levels = nn.ModuleList(
            [
                nn.Sequential(FrozenConv2d(width, c0, 1), nn.ConvTranspose2d(c0, c0, 4, stride=4)),
                nn.Sequential(FrozenConv2d(width, c1, 1), nn.ConvTranspose2d(c1, c1, 2, stride=2)),
                nn.Sequential(FrozenConv2d(width, c2, 1)),
                nn.Sequential(FrozenConv2d(width, c3, 1), FrozenConv2d(c3, c3, 3, stride=2, padding=1)),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class RandomProjection(nn.Module):
    """Cross-channel mixing (CCM), then cross-scale mixing (CSM) from the coarsest level up.

    Takes four maps, fine to coarse, with `tap_channels`, each half the size of the one before (or, with `reassemble`,
    all of one size); returns four, twice as large, with `OUT_CHANNELS`. The weights are torch's initial ones for
    convolutions and are never trained.
    """

    def __init__(self, tap_channels: Sequence[int], reassemble: bool = False):
        super().__init__()
        self.reassemble = Reassemble(tap_channels[0]) if reassemble else nn.Identity()
        in_channels = REASSEMBLED_CHANNELS if reassemble else tap_channels
        self.ccm = nn.ModuleList(FrozenConv2d(i, o, 1) for i, o in zip(in_channels, MIXED_CHANNELS, strict=True))
        self.csm = nn.ModuleList(FrozenConv2d(i, o, 1) for i, o in zip(MIXED_CHANNELS, OUT_CHANNELS, strict=True))
        self.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = self.reassemble(maps)
        mixed: list[Tensor] = []
        for x, ccm, csm in reversed(list(zip(maps, self.ccm, self.csm, strict=True))):
            x = ccm(x)
            if mixed:
                x = x + mixed[-1]
            # The paper upsamples first. A 1x1 convolution commutes with an interpolation whose weights add up to one,
            # and takes a quarter of the time before it.
            mixed.append(F.interpolate(csm(x), scale_factor=2, mode="bilinear", align_corners=True))
        return mixed[::-1]
