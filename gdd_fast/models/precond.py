"""Preconditioning: how a U-Net F becomes a denoiser D(x; sigma), for EDM's teachers and GDD's generators.

D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise, labels), with sd = sigma_data and eps = sigma_eps:

    c_skip  = sd^2 / ((sigma - eps)^2 + sd^2)
    c_out   = (sigma - eps) * sd / sqrt(sigma^2 + sd^2)
    c_in    = 1 / sqrt(sigma^2 + sd^2)
    c_noise = ln(sigma) / 4

EDM (Karras et al., arXiv 2206.00364, table 1) has eps = 0; GDD (Zheng & Yang, arXiv 2405.20750) has eps = 0.002.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.edm import ARCHITECTURES
from gdd_fast.models.preconditioned import SIGMA_INIT, Preconditioned, check_sigma_init, is_row_each

COMPUTE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class EDMPrecond(Preconditioned):
    """A U-Net with EDM's preconditioning.

    Args:
        img_resolution, img_channels, label_dim: side and channels of the square images, number of classes (0: none).
        use_fp16: accepted so that EDM's own arguments work unchanged, but has no effect: `dtype` alone decides.
        sigma_min, sigma_max: range of supported noise levels (samplers clamp to it).
        sigma_data: standard deviation of the training data in [-1, 1].
        model_type: "SongUNet" | "DhariwalUNet".
        sigma_eps: eps of the formula above.
        sigma_init: the noise level of the one step, 80 in GDD.
        dtype: dtype of the U-Net's activations, a torch.dtype or its name: float32, bfloat16 or float16. Parameters,
        embeddings, normalisation statistics and softmax are always float32.
        **model_kwargs: arguments of the U-Net, with EDM's names.

    Raises ConfigError for arguments that cannot make a network.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        sigma_eps: float = 0.0,
        sigma_init: float = SIGMA_INIT,
        dtype: torch.dtype | str = torch.float32,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ConfigError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {model_type!r:.100}.")
        architecture = ARCHITECTURES[model_type]
        own = {"in_channels", "out_channels"}
        unknown = sorted(set(model_kwargs) - (set(inspect.signature(architecture).parameters) - own))
        if unknown:
            raise ConfigError(f"{model_type} has no argument {', '.join(unknown):.300}.")
        if not isinstance(label_dim, int) or label_dim < 0:
            raise ConfigError(f"label_dim must be the number of classes, or 0, got {label_dim!r:.100}.")
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.sigma_min = _level("sigma_min", sigma_min)
        self.sigma_max = _level("sigma_max", sigma_max)
        self.sigma_data = _level("sigma_data", sigma_data)
        self.sigma_eps = _level("sigma_eps", sigma_eps)
        self.sigma_init = check_sigma_init(sigma_init, 0.0, math.inf)
        self.model_type = model_type
        self.model_kwargs = {name: _plain(name, value) for name, value in model_kwargs.items()}
        self.dtype = compute_dtype(dtype)
        self.model: Any = architecture(
            img_resolution=self.img_resolution,
            in_channels=self.img_channels,
            out_channels=self.img_channels,
            label_dim=self.label_dim,
            **self.model_kwargs,
        )

    def init_config(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild this network, as JSON types.

        An infinite `sigma_max`, the default, is left out, as JSON has no infinity. So is a `sigma_init` of 80, for
        programs that know no other.
        """
        config = {
            "img_resolution": self.img_resolution,
            "img_channels": self.img_channels,
            "label_dim": self.label_dim,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
            "sigma_eps": self.sigma_eps,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_type": self.model_type,
            **self.model_kwargs,
        }
        if math.isinf(self.sigma_max):
            del config["sigma_max"]
        if self.sigma_init != SIGMA_INIT:
            config["sigma_init"] = self.sigma_init
        return config

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        force_fp32: bool = False,
    ) -> Tensor:
        """Denoised images D(x; sigma), float32 (N, C, H, W).

        Args:
            x: noisy images (N, C, H, W), any floating dtype.
            sigma: noise level > 0, one for all images or N of them.
            class_labels: (N, label_dim) or (1, label_dim), one-hot; None means zeros, "no class".
            augment_labels: (N, augment_dim) or (1, augment_dim); None for images that were not augmented.
            force_fp32: compute in float32 whatever `dtype` is, as with EDM's networks.

        Raises ConfigError if the shapes do not fit the network.
        """
        self._check_images(x)
        x = x.to(torch.float32)
        sigma = self._noise_levels(sigma, x).reshape(-1, 1, 1, 1)
        labels = self._class_labels(class_labels, x)
        if augment_labels is not None:
            self._check_augment_labels(augment_labels, x)

        variance = self.sigma_data**2
        offset = sigma - self.sigma_eps if self.sigma_eps else sigma
        c_skip = variance / (offset.square() + variance)
        c_out = offset * self.sigma_data / (sigma.square() + variance).sqrt()
        c_in = 1 / (sigma.square() + variance).sqrt()
        c_noise = sigma.log() / 4

        f = self.model(
            (c_in * x).to(torch.float32 if force_fp32 else self.dtype), c_noise.flatten(), labels, augment_labels
        )
        return c_skip * x + c_out * f.to(torch.float32)

    def _check_augment_labels(self, labels: Tensor, x: Tensor) -> None:
        layer = self.model.map_augment
        if layer is None:
            raise ConfigError("the network has no augmentation layer (augment_dim is 0): give no augment_labels.")
        if not is_row_each(labels, x, layer.in_features):
            expected = (x.shape[0], layer.in_features)
            raise ConfigError(f"augment_labels must be {expected}, got {tuple(labels.shape)}.")


class GDDPrecond(EDMPrecond):
    """A U-Net with GDD's preconditioning: EDM's with eps = 0.002, so that D(x; 0.002) = x."""

    def __init__(self, *args: Any, sigma_eps: float = 0.002, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, sigma_eps=sigma_eps)  # type: ignore[misc]


def compute_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`dtype` as a torch.dtype. Raises ConfigError if networks cannot compute in it."""
    name = str(dtype).removeprefix("torch.")
    if name not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {name!r}.")
    return COMPUTE_DTYPES[name]


def _level(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"{name} must be a number of at least 0, got {value!r:.100}.")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is a whole number too large for a noise level, {value!r:.100}.") from None


def _plain(name: str, value: Any) -> Any:
    """An argument as JSON types: numbers, strings, and lists of numbers."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
        return list(value)
    raise ConfigError(f"{name:.100} must be a number, a string or a list of numbers, got {value!r:.100}.")
