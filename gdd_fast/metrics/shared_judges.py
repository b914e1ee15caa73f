"""Judges that the discriminator used too: their features are ones that the generator was trained against."""

import json
from collections.abc import Sequence
from pathlib import Path

from gdd_fast.metrics.features import FeatureExtractor


def shared_judges(backbones: Sequence[str], extractors: Sequence[FeatureExtractor]) -> list[str]:
    """A line for each feature network that is also among the discriminator's `backbones`, given by name."""
    networks = {name.removesuffix("_bn") for name in backbones}
    return [
        f"note: {extractor.name} is also a backbone of the discriminator, so the generator is trained against the "
        "features that judge it. Measure with another network too, such as fd@lite2 or fid."
        for extractor in extractors
        if extractor.backbone in networks
    ]


def backbones_of(net: Path) -> list[str]:
    """The backbones of the discriminator that a generator was trained with; `net` is its run's folder, or one in `best`
    there.

    Empty for a network that is not in its run's folder.
    """
    run = net.parent.parent if net.parent.name == "best" else net
    try:
        config = json.loads((run / "config.json").read_text())
        return list(config["discriminator"]["backbones"])
    except (OSError, ValueError, LookupError, TypeError):
        return []  # not a run's folder: networks have a config.json too
