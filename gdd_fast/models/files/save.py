"""Writes a network as a folder with config.json and model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write, write_tensors
from gdd_fast.models.precond import EDMPrecond, GDDPrecond
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.models.teachers.unet2d import UNet2DPrecond

FORMAT = "gdd_fast.network"
VERSION = 1
PRECONDS: dict[str, type[Preconditioned]] = {"edm": EDMPrecond, "gdd": GDDPrecond, "unet2d": UNet2DPrecond}


def save_network(
    net: Preconditioned,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `net` to `folder`/config.json and model.safetensors, with parameters in `dtype`. `weights`: a matching
    state_dict to store instead of its own. Raises ConfigError for a network of another class.

    Buffers keep their dtype: a Fourier embedding's frequencies must not be rounded. Each file is replaced atomically,
    the configuration last, so a folder that has one is complete.
    """
    folder = Path(folder)
    kind = next((name for name, cls in PRECONDS.items() if type(net) is cls), None)
    if kind is None:
        raise ConfigError(f"only {', '.join(cls.__name__ for cls in PRECONDS.values())} can be saved, not {type(net)}.")
    config = {"format": FORMAT, "version": VERSION, "precond": kind, "init": net.init_config()}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    parameters = {name for name, _ in net.named_parameters()}
    state = {
        name: tensor.detach().to("cpu", dtype if name in parameters else tensor.dtype).contiguous()
        for name, tensor in (net.state_dict() if weights is None else weights).items()
    }

    path = folder / "config.json"
    if path.exists() and path.read_text() != text:
        path.unlink()  # So that another network's configuration is never beside these weights, wherever writing stops.
    write_tensors(folder / "model.safetensors", state)
    with atomic_write(path) as temporary:
        temporary.write_text(text)
