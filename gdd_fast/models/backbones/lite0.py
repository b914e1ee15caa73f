"""EfficientNet-lite0 as TensorFlow trained it: no squeeze-excitation, ReLU6, "SAME" padding."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.layers.frozen_conv import FrozenConv2d, conv_norm_relu
from gdd_fast.models.backbones.base import Backbone, ConvNorm
from gdd_fast.ops.frozen_conv2d_relu import Activation

_BN_EPS = 1e-3


class Stage(NamedTuple):
    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
_TAPPED_STAGES = (1, 2, 4, 6)


class SameConv2d(FrozenConv2d):
    """A strided convolution with TensorFlow's "SAME" padding: an odd total adds one row more after than before."""

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        (top, bottom), (left, right) = (self._same(size) for size in x.shape[-2:])
        if top < bottom and left < right and x.device.type == "cpu":
            # A zero row and column before the kernel have the effect of unequal padding, and padding a few weights is
            # cheaper than padding the image. GPUs only have kernels for odd sizes.
            return self._convolve(x, (bottom, right), activation, pad=(1, 0, 1, 0))
        if top < bottom or left < right:
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return self._convolve(x, (top, left), activation)

    def _same(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> FrozenConv2d:
    if stride == 1:  # "SAME" is symmetric for odd kernels
        return FrozenConv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    return SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BN_EPS)


class DepthwiseSeparable(nn.Module):
    """Depthwise convolution, then 1x1: the first block, which has no expansion."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.conv_dw = _conv(in_channels, in_channels, kernel, groups=in_channels)
        self.bn1 = _norm(in_channels)
        self.conv_pw = _conv(in_channels, out_channels, 1)
        self.bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_relu(self.conv_dw, self.bn1, x, "relu6")
        return self.bn2(self.conv_pw(x))

    def conv_norms(self) -> Iterator[ConvNorm]:
        yield ConvNorm(self, "conv_dw", "bn1")
        yield ConvNorm(self, "conv_pw", "bn2")


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; a residual if the shape allows it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = in_channels * expand
        self.residual = stride == 1 and in_channels == out_channels
        self.conv_pw = _conv(in_channels, hidden, 1)
        self.bn1 = _norm(hidden)
        self.conv_dw = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn2 = _norm(hidden)
        self.conv_pwl = _conv(hidden, out_channels, 1)
        self.bn3 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_relu(self.conv_pw, self.bn1, x, "relu6")
        h = conv_norm_relu(self.conv_dw, self.bn2, h, "relu6")
        h = self.bn3(self.conv_pwl(h))
        return h + x if self.residual else h

    def conv_norms(self) -> Iterator[ConvNorm]:
        yield ConvNorm(self, "conv_pw", "bn1")
        yield ConvNorm(self, "conv_dw", "bn2")
        yield ConvNorm(self, "conv_pwl", "bn3")


class Lite0(Backbone):
    """timm's `tf_efficientnet_lite0`, tapped as in Projected GAN: strides 4, 8, 16 and 32.

    It also computes features for this library's Frechet distances (`pooled`), and ImageNet classes (`logits`).
    """

    name = "tf_efficientnet_lite0"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    stages = STAGES
    """The network's stages; larger networks of the family have others."""
    tap_channels = tuple(STAGES[i].channels for i in _TAPPED_STAGES)  # type: ignore[assignment]
    tap_strides = (4, 8, 16, 32)

    def __init__(self):
        super().__init__()
        self.conv_stem = _conv(3, 32, 3, stride=2)
        self.bn1 = _norm(32)
        stages: list[nn.Module] = []
        channels = 32
        for stage in self.stages:
            blocks: list[nn.Module] = []
            for i in range(stage.blocks):
                if stage.expand == 1:
                    blocks.append(DepthwiseSeparable(channels, stage.channels, stage.kernel))
                else:
                    stride = stage.stride if i == 0 else 1
                    blocks.append(InvertedResidual(channels, stage.channels, stage.kernel, stride, stage.expand))
                channels = stage.channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv(channels, 1280, 1)
        self.bn2 = _norm(1280)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = conv_norm_relu(self.conv_stem, self.bn1, x, "relu6")
        maps = []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in _TAPPED_STAGES:
                maps.append(x)
        return tuple(maps)

    def pooled(self, x: Tensor) -> Tensor:
        """Features before the classifier, averaged over the image: normalised `(N, 3, H, W)` -> `(N, 1280)`."""
        coarsest = self(x)[-1]
        return conv_norm_relu(self.conv_head, self.bn2, coarsest, "relu6").mean(dim=(2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """ImageNet class scores: normalised `(N, 3, H, W)` -> `(N, 1000)`."""
        return self.classifier(self.pooled(x))

    def conv_norms(self) -> Iterator[ConvNorm]:
        yield ConvNorm(self, "conv_stem", "bn1")
        for stage in self.blocks:
            for block in stage:  # type: ignore[attr-defined]
                yield from block.conv_norms()
        yield ConvNorm(self, "conv_head", "bn2")
