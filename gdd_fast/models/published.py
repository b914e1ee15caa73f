"""The networks that EDM and this method's paper publish, by name: what a file of weights alone does not say."""

import re
from typing import Any

from gdd_fast.models.edm import adm, ddpmpp, ncsnpp

_SMALL = {"img_resolution": 32, "img_channels": 3}
_LARGE = {"img_resolution": 64, "img_channels": 3}
_FACES = {"channel_mult": [1, 2, 2, 2]}

PUBLISHED: dict[str, dict[str, Any]] = {
    "edm-cifar10-32x32-uncond-ve": {**_SMALL, **ncsnpp()},
    "edm-cifar10-32x32-uncond-vp": {**_SMALL, **ddpmpp()},
    "edm-cifar10-32x32-cond-ve": {**_SMALL, "label_dim": 10, **ncsnpp()},
    "edm-cifar10-32x32-cond-vp": {**_SMALL, "label_dim": 10, **ddpmpp()},
    "edm-afhqv2-64x64-uncond-ve": {**_LARGE, **ncsnpp(**_FACES)},
    "edm-afhqv2-64x64-uncond-vp": {**_LARGE, **ddpmpp(**_FACES)},
    "edm-ffhq-64x64-uncond-ve": {**_LARGE, **ncsnpp(**_FACES)},
    "edm-ffhq-64x64-uncond-vp": {**_LARGE, **ddpmpp(**_FACES)},
    "edm-imagenet-64x64-cond-adm": {**_LARGE, "label_dim": 1000, **adm()},
}
"""Arguments of `EDMPrecond` by the name of EDM's file, without the augmentation layer (`augment_dim`)."""

_PRESETS = {
    "cifar10-uncond": "edm-cifar10-32x32-uncond-ve",
    "cifar10-cond": "edm-cifar10-32x32-cond-ve",
    "afhqv2-64": "edm-afhqv2-64x64-uncond-ve",
    "ffhq-64": "edm-ffhq-64x64-uncond-ve",
    "imagenet-64": "edm-imagenet-64x64-cond-adm",
}


def published(name: str) -> dict[str, Any] | None:
    """The arguments of the network that `name` names, a preset's teacher or one of EDM's files; None for any other."""
    preset = re.sub(r"-gdd(-i)?$", "", name)
    return PUBLISHED.get(_PRESETS.get(preset, name.removesuffix(".pkl")))
