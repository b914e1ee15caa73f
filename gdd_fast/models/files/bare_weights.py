"""Weights without a description: a state_dict in a .safetensors, .pt or .pth file, with EDM's names.

Such a file does not describe its network, which has to be named separately (`convert --like`). Names may have prefixes
that programs add ("net.", "module.") or lack one if the U-Net was saved without its preconditioning, and the file may
hold several state_dicts under keys, of which one is chosen.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gdd_fast.errors import WeightsError
from gdd_fast.models.files.tensor_files import read_tensor_file

SUFFIXES = (".safetensors", ".pt", ".pth")
_ANCHOR = "map_layer0.weight"  # every network of EDM has it once
_AUGMENT = "model.map_augment.weight"
# Parts of names in other projects' networks, and never in EDM's.
_FOREIGN = {
    "adaLN_modulation": "a DiT",
    "model.diffusion_model.": "a latent diffusion model (LDM, Stable Diffusion)",
    "first_stage_model.": "a latent diffusion model (LDM, Stable Diffusion)",
    "emb_gain": "an EDM2 network, whose layers keep magnitudes",
    "down_blocks.": "a network of diffusers; give the folder or Hub name that diffusers loads it from, as --teacher",
    "input_blocks.": "a network of guided-diffusion or consistency models in their own form; convert it with diffusers",
}


def read_bare(path: Path, key: str = "ema") -> tuple[dict[str, Tensor], int]:
    """The state_dict in `path` under the names of an `EDMPrecond`, and the width of its augmentation layer (0: none).

    `key` chooses among several in the file. Nothing in the file is executed.

    Raises a WeightsError that names the file if it cannot be read or holds no network with EDM's names.
    """
    state = _pick(read_tensor_file(path), key, path)
    for text, what in _FOREIGN.items():
        if any(text in name for name in state):
            raise WeightsError(f"{path} holds {what}: only networks with EDM's names can be loaded")
    anchors = [name for name in state if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    if len(anchors) != 1:
        found = ", ".join(list(state)[:3]) or "nothing"
        raise WeightsError(f"{path} holds no network with EDM's names (it begins with {found}); only these are loaded")
    prefix = anchors[0].removesuffix(_ANCHOR).removesuffix("model.")
    bare = not anchors[0].endswith(f"model.{_ANCHOR}")
    state = {("model." if bare else "") + name.removeprefix(prefix): tensor for name, tensor in state.items()}
    augment = state.get(_AUGMENT)
    return state, 0 if augment is None or augment.ndim != 2 else augment.shape[1]


def _pick(content: Any, key: str, path: Path) -> dict[str, Tensor]:
    """The state_dict itself, or the one under `key`."""
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state_dict (tensors by name)")
    if not _is_state(content):
        states = [str(name) for name, value in content.items() if _is_state(value)]
        if key not in states:
            choice = f"--key can be {' or '.join(states)}" if states else "it holds no tensors by name"
            raise WeightsError(f"{path} has no state_dict {key!r}: {choice}")
        content = content[key]
    return dict(content)


def _is_state(value: Any) -> bool:
    whole = isinstance(value, Mapping) and len(value) > 0
    return whole and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
