"""Reads files of plain tensors, safetensors' or torch.save's, without executing anything, and compares tensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdd_fast.errors import WeightsError
from gdd_fast.files import check_readable


def read_tensor_file(path: Path) -> Any:
    """The content of a .safetensors file, or of any other by torch.load without executing code, on the CPU.

    Raises a WeightsError that names the file if it is missing, damaged or holds more than tensors in plain containers,
    and PermissionError if it may not be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    check_readable(path)
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError  # networks from other files work without that library
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} cannot be read ({error}): the file is damaged; copy or make it again"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, but only tensors are loaded: save just the network's state_dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # a KeyError's text is a byte that is not a pickle opcode
        reason = "not a torch.save file" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise WeightsError(f"{path} cannot be read ({reason:.200}): the file is damaged; get it again") from error


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """The differences in name and shape between the tensors `given` and those `expected` of a network."""
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is not part of the network" for name in given if name not in expected]
    return problems + [
        f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name].shape
    ]


def listed(problems: list[str]) -> str:
    """The first five problems, and how many more there are."""
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
