"""The feature networks, one per file: they describe the images whose distributions metrics compare.

Distances are comparable only for the same features at the same resolution, so both are part of the name that is stored
with statistics. Only the Frechet distance of `inception` is a FID.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gdd_fast.errors import ConfigError
from gdd_fast.metrics.features.efficientnet_lite import Lite0Features, Lite2Features
from gdd_fast.metrics.features.extractor import FeatureExtractor
from gdd_fast.metrics.features.inception import InceptionFeatures
from gdd_fast.metrics.features.lpips import LpipsFeatures
from gdd_fast.metrics.features.pixels import PixelFeatures
from gdd_fast.metrics.features.resnet56 import ResNet56Features
from gdd_fast.metrics.features.timm_networks import CLIP, DINOV2, TimmFeatures
from gdd_fast.metrics.features.vgg16_pooled import Vgg16Features

__all__ = ["NETWORKS", "FeatureExtractor", "PixelFeatures", "build_extractor"]

NETWORKS: dict[str, Callable[..., FeatureExtractor]] = {
    "inception": InceptionFeatures.load,
    "lite0": Lite0Features.load,
    "lite2": Lite2Features.load,
    "vgg16": Vgg16Features.load,
    "resnet56": ResNet56Features.load,
    "dinov2": partial(TimmFeatures, "dinov2", DINOV2),
    "clip": partial(TimmFeatures, "clip", CLIP),
    "lpips": LpipsFeatures.load,
    "lpips-vgg": partial(LpipsFeatures.load, network="vgg16"),
    "pixels": PixelFeatures.load,
}
"""Called with a weights file or None, and the keywords `resolution` and `device`."""

LARGEST = 2048
"""The largest image side in pixels for any network: some four times what any was trained with."""
_TIMM = "timm:"


def build_extractor(
    name: str, *, resolution: int | None = None, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor called `name` in `NETWORKS`, or for any network of timm, such as `timm:resnet50.a1_in1k`.

    `resolution` None means the network's own default. `weights` is a local file; by default the weights come from where
    the network's module says. Raises `ConfigError` for an unknown name or unsupported resolution, `WeightsError` if the
    weights are missing or do not fit.
    """
    if resolution is not None and resolution > LARGEST:
        raise ConfigError(
            f"features are computed at {LARGEST:,} pixels at most (--feature-resolution), not {resolution:,}"
        )
    options = {"device": device} | ({} if resolution is None else {"resolution": resolution})
    if name.startswith(_TIMM):
        return TimmFeatures(name, name.removeprefix(_TIMM), weights, **options)
    if name not in NETWORKS:
        raise ConfigError(f"unknown features {name!r}; choose from {', '.join(NETWORKS)}, or {_TIMM}NAME")
    return NETWORKS[name](weights, **options)
