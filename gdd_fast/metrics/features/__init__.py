"""What images are described by before their distributions are compared: the feature networks, a file each.

A distance compares only with distances of the same features at the same resolution, so both are part of the name that
travels with the statistics. The Frechet distance of one of them is a FID: that of `inception`.
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
"""Made from a weights file or None, and the keywords `resolution` and `device`."""

LARGEST = 2048
"""Pixels of a side that any network is shown at most: some four times as many as any was trained with."""
_TIMM = "timm:"


def build_extractor(
    name: str, *, resolution: int | None = None, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor of a name in `NETWORKS`, or of any network of timm, as `timm:resnet50.a1_in1k`.

    `resolution` None is the network's own default. `weights` is a local file; by default the weights come from where
    the network's file says. Raises `ConfigError` for another name or a resolution that it does not take, `WeightsError`
    if the weights cannot be had.
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
