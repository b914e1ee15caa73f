"""DINOv2, CLIP and any other network of timm, which provides architecture, preprocessing and, if need be, weights."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.metrics.features.extractor import NetworkFeatures, of_bytes, resized
from gdd_fast.metrics.features.weight_files import digest, read_weights

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
CLIP = "vit_base_patch32_clip_quickgelu_224.openai"


class TimmFeatures(NetworkFeatures):
    """The input of a timm network's classifier; for CLIP, the image's embedding.

    Images are resized to the network's own resolution (or `resolution`), bicubic and antialiased, and normalised with
    its own mean and deviation. EDM2's FD of DINOv2 and clean-fid's CLIP-FID do the same with Pillow, which rounds to
    bytes after resizing.

    Args:
        name: the features' name.
        model: timm's name, `architecture.weights`.
        weights: a file from timm, or one that timm can convert, such as Meta's dinov2_vitl14_pretrain.pth or OpenAI's
        ViT-B-32.pt; None: timm's own, from the Hugging Face Hub's cache or the Hub.
    """

    def __init__(
        self,
        name: str,
        model: str,
        weights: str | Path | None = None,
        *,
        resolution: int | None = None,
        device: torch.device | str = "cpu",
    ):
        timm = _timm()
        config = timm.get_pretrained_cfg(model)
        if config is None:
            raise ConfigError(f"timm has no network {model!r}; timm.list_pretrained() lists them")
        resolution = resolution or config.input_size[-1]
        if name == "dinov2" and resolution == config.input_size[-1]:
            resolution = 224  # published distances are at 224, not at timm's default of 518
        network = _network(timm, name, model, weights, resolution)
        self.name = f"{name}-{resolution}"
        if weights is not None:
            self.name += f"-{digest(network.state_dict())[:8]}"
        self.dim = network.num_features if network.num_classes == 0 else network.num_classes
        self.resolution, self.device = resolution, torch.device(device)
        self.network = network.eval().requires_grad_(False).to(device)
        self._mean, self._std = of_bytes(config.mean, device), of_bytes(config.std, device)

    def _features(self, pixels: Tensor) -> Tensor:
        x = resized(pixels, self.resolution, "bicubic").clamp(0, 255)
        return self.network((x - self._mean) / self._std).float()


def _timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # raised by torchvision if its build does not match torch's
        raise ConfigError(
            f"dinov2, clip and timm:NAME need timm (pip install timm), which does not import: {error}"
        ) from None
    return timm


def _network(timm: Any, name: str, model: str, weights: str | Path | None, resolution: int) -> nn.Module:
    is_clip = "_clip_" in model
    options = {} if is_clip else {"num_classes": 0}  # CLIP's classifier is its projection
    if "vit" in model:
        options["img_size"] = resolution
    if weights is None:
        try:
            return timm.create_model(model, pretrained=True, **options)
        except Exception as error:  # anything the Hub's client raises, its HTTP libraries included
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"the weights of {model} are not in the Hugging Face hub's cache and could not be fetched ({reason}): "
                f"get model.safetensors of https://huggingface.co/timm/{model} and pass --feature-weights {name}=PATH"
            ) from None
    network = timm.create_model(model, pretrained=False, **options)
    state = read_weights(Path(weights))
    # What timm does to weights that it fetches: renames them, and resizes position embeddings to the resolution.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        state = state if convert is None else convert(state, network)
        if network.num_classes == 0:
            classifier = network.pretrained_cfg["classifier"]
            names = (classifier,) if isinstance(classifier, str) else classifier or ()
            state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{name}." for name in names))}
        network.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(f"{weights}: not weights of {model}: {' '.join(str(error).split())[:300]}") from None
    return network
