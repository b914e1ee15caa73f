"""Distances between images, by `--teacher-loss-distance`: two of (N, C, H, W) -> (N,), differentiable."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdd_fast.metrics.features.lpips import Lpips, load_lpips

LPIPS_RESOLUTION = 64
"""Smaller images are enlarged bilinearly to this size: LPIPS's networks were trained on larger ones."""
HUBER_SCALE = 0.00054


def squared(a: Tensor, b: Tensor) -> Tensor:
    """The mean over channels and pixels of the squared difference."""
    return (a - b).square().mean(dim=(1, 2, 3))


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c with c = 0.00054 sqrt(C H W): Song & Dhariwal, arXiv 2310.14189."""
    c = HUBER_SCALE * a[0].numel() ** 0.5
    return ((a - b).square().sum(dim=(1, 2, 3)) + c * c).sqrt() - c


class LpipsDistance(nn.Module):
    """LPIPS of images in [-1, 1]; gray images are repeated to three channels."""

    def __init__(self, lpips: Lpips) -> None:
        super().__init__()
        self.lpips = lpips

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.lpips(self._prepared(a), self._prepared(b))

    def _prepared(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] >= LPIPS_RESOLUTION:
            return x
        return interpolate(x, size=(LPIPS_RESOLUTION,) * 2, mode="bilinear", align_corners=False)


Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"l2": squared, "pseudo-huber": pseudo_huber}


def build_distance(name: str, weights: Mapping[str, Path], device: torch.device | str = "cpu") -> Distance:
    """The distance called `name`; `weights` as in `--feature-weights`. Raises `WeightsError` if LPIPS's are missing."""
    if name in DISTANCES:
        return DISTANCES[name]
    network = "vgg16" if name == "lpips-vgg" else "alexnet"
    return LpipsDistance(load_lpips(network, weights.get(name))).to(device)
