"""Reads what diffusers' `save_pretrained` writes for an unconditional pipeline: a UNet2DModel and its scheduler.

Both layouts are supported: `unet/` and `scheduler/` subfolders, and the older one with their files in the folder itself
(google/ddpm-cifar10-32). diffusers reads the weights, as it knows the names that older versions used.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.teachers import parametrisation_of
from gdd_fast.models.teachers.unet2d import UNet2DPrecond, unet_class

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` is a diffusers pipeline, or the U-Net of one."""
    return (folder / INDEX).is_file() or (folder / "unet" / "config.json").is_file() or _is_unet(folder)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `UNet2DPrecond`, and its state, from a pipeline's folder.

    Raises a WeightsError that names what is missing, broken or not supported.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next((path for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if path.is_file()), None)
    if not (unet / "config.json").is_file():
        raise WeightsError(f"{folder} has no unet/config.json: only pipelines with a UNet2DModel can be distilled from")
    if scheduler is None:
        raise WeightsError(
            f"{folder} has no scheduler/{SCHEDULER}, which says what the U-Net predicts: give the pipeline's folder"
        )
    config = _json(unet / "config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise WeightsError(f"{unet} is a {kind!r:.100}, but only a UNet2DModel can be distilled from")
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        init: dict[str, Any] = {"unet": own, "parametrisation": parametrisation_of(_json(scheduler))}
        cls = unet_class()
        with torch.device("meta"):
            UNet2DPrecond(**init)  # report unsupported settings before weights that do not fit them
    except ConfigError as error:
        raise WeightsError(f"{folder}: {error}") from error
    return init, {f"model.{name}": tensor for name, tensor in _state(cls, unet).items()}


def _state(cls: Any, unet: Path) -> dict[str, Tensor]:
    try:
        # low_cpu_mem_usage needs the library `accelerate`, which may be missing
        options = {"local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
        model, told = cls.from_pretrained(unet, **options)
    except Exception as error:  # anything that diffusers and its file readers raise
        raise WeightsError(f"{unet} cannot be read by diffusers: {str(error).strip().partition(chr(10))[0]}") from error
    problems = [f"{name} is missing" for name in told["missing_keys"]]
    problems += [f"{name} is not part of the network" for name in told["unexpected_keys"]]
    problems += [f"{name} has another shape" for name, *_ in told["mismatched_keys"]]
    if problems:
        raise WeightsError(f"{unet}: the weights do not fit the network: {'; '.join(problems[:5])}")
    return model.state_dict()


def _is_unet(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and _json(path).get("_class_name") is not None


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}
