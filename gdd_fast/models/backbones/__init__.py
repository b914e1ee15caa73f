"""The frozen ImageNet networks of a projected discriminator.

State-dict names are torchvision's for VGG-16 and timm's for the others; neither library is needed.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.backbones.base import Backbone, ConvNorm, fold_batch_norm, probe_batch_norm
from gdd_fast.models.backbones.deit import DeitBase
from gdd_fast.models.backbones.lite0 import Lite0
from gdd_fast.models.backbones.vgg import Vgg16
from gdd_fast.models.files.tensor_files import listed, misfits

Network = TypeVar("Network", bound=nn.Module)
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "vgg16_bn": lambda: Vgg16(batch_norm=True),
    "vgg16": lambda: Vgg16(batch_norm=False),
    "tf_efficientnet_lite0": Lite0,
    "deit_base_distilled_patch16_224": DeitBase,
}


def build_backbone(name: str, weights: Mapping[str, Tensor] | None, resolution: int = 224) -> Backbone:
    """The backbone `name`, frozen and in eval mode, with `weights` (None: torch's random initialisation).

    `resolution` is the size of its square input images. Raises `ConfigError` for a size it cannot take or an unknown
    name, `WeightsError` for weights that do not fit.
    """
    make = _maker(name)
    backbone = make() if weights is None else made_of(make, name, weights)
    check_resolution(backbone, resolution)
    return backbone.eval().requires_grad_(False)


def check_resolution(backbone: Backbone, resolution: int) -> None:
    """Raise a `ConfigError` unless `backbone` can take square images of this size."""
    if backbone.fixed_resolution not in (None, resolution):
        raise ConfigError(
            f"backbone {backbone.name} takes {backbone.fixed_resolution}x{backbone.fixed_resolution} images only, "
            f"not {resolution}x{resolution}; set the discriminator resolution to {backbone.fixed_resolution} "
            "or choose another backbone"
        )
    if resolution < 32 or resolution % 32:
        raise ConfigError(f"the discriminator resolution must be a positive multiple of 32, not {resolution}")


def fit_weights(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` as float32 tensors, exactly those of backbone `name`; unused classifiers are dropped.

    Raises a `WeightsError` that names the first few tensors that are missing, unexpected or of the wrong shape.
    """
    with torch.device("meta"):
        backbone = _maker(name)()
    return fit_to(backbone, name, weights)


def made_of(make: Callable[[], Network], name: str, weights: Mapping[str, Tensor]) -> Network:
    """`make()`, called `name` in errors, with these weights, frozen and in eval mode. Raises as `fit_weights`."""
    with torch.device("meta"):  # spend no time on initial values that are replaced at once
        network = make()
    network.load_state_dict(fit_to(network, name, weights), assign=True)
    return network.eval().requires_grad_(False)


def fit_to(network: nn.Module, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`fit_weights` for any network, called `name` in errors; its `unused_weights` are prefixes of what to drop."""
    unused = getattr(network, "unused_weights", ())
    expected = network.state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith(unused or "\0")}
    # Older files lack the batch counters; eval mode never reads them.
    kept |= {key: torch.zeros((), dtype=torch.long) for key in expected if key.endswith("num_batches_tracked")}
    if problems := misfits(expected, kept):
        raise WeightsError(f"these are not weights of {name}: {listed(problems)}")
    return {key: kept[key].to(expected[key].dtype) for key in expected}


def _maker(name: str) -> Callable[[], Backbone]:
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]
