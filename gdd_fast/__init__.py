"""One-step image generators from pretrained diffusion models (GDD / GDD-I), with fused kernels.

Public names, imported on first use so that `import gdd_fast` is quick:

    load_generator(path, device=None, dtype=None)    an EDM or GDD .pkl, a network folder or a run folder -> nn.Module
    OneStepGenerator.from_pretrained(path, ...)      the same as a fast function from seeds to images
    accelerate(net, backend="auto", report=False)    makes a network of EDM, diffusers, timm or torchvision faster
    restore(net)                                     undoes accelerate
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdd_fast.acceleration import accelerate, restore
    from gdd_fast.engine.one_step import OneStepGenerator
    from gdd_fast.models.files.load import load_generator

__version__ = "0.2.0"

__all__ = ["OneStepGenerator", "__version__", "accelerate", "load_generator", "restore"]

_LAZY = {
    "OneStepGenerator": "gdd_fast.engine.one_step",
    "accelerate": "gdd_fast.acceleration",
    "load_generator": "gdd_fast.models.files.load",
    "restore": "gdd_fast.acceleration",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
