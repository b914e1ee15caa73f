"""One file with everything needed to resume: tensors as safetensors, the rest as JSON in its header.

A single file that is replaced by a rename holds the old state or the new one, never a mixture. Nothing is pickled.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.errors import CheckpointError
from gdd_fast.files import check_readable, write_tensors
from gdd_fast.training.sharding import is_sharded, laid_out_as

FORMAT = "gdd_fast.checkpoint"
VERSION = 1
Sections = dict[str, dict[str, Tensor]]
"""Tensors by name, in sections by name."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by `section/name`, and JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name/`, without the prefix."""
        prefix = name + "/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def sections(self) -> Sections:
        """All sections."""
        names = dict.fromkeys(key.partition("/")[0] for key in self.tensors)
        return {name: self.section(name) for name in names}

    def load_module(self, name: str, module: nn.Module) -> None:
        """Copy a section into a module, sharded or not; raises `CheckpointError` if names or shapes differ."""
        section, own = self.section(name), module.state_dict()
        try:
            parts = {key: laid_out_as(t, section[key]) for key, t in own.items() if key in section and is_sharded(t)}
            module.load_state_dict({**section, **parts})
        except (RuntimeError, ValueError) as error:
            reason = f"{' '.join(str(error).split()):.300}"
            raise CheckpointError(f"the checkpoint's {name} does not fit this configuration: {reason}") from None

    def load_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Restore an optimizer saved with `optimizer_tensors` and `optimizer_values`, except its learning rates.

        These are left as they are: a run may resume with others. Raises `CheckpointError` if the parameters differ.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.section(name).items():
            index, _, entry = key.partition("/")
            state.setdefault(int(index), {})[entry] = tensor
        params = [p for group in optimizer.param_groups for p in group["params"]]
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for index, entries in state.items():
                entries.update({entry: laid_out_as(params[index], t) for entry, t in entries.items() if t.ndim})
            optimizer.load_state_dict({"state": state, "param_groups": self.values[name]})
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's {name} does not fit this configuration: {error}") from None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `index/entry` tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{entry}": tensor for index, entries in state.items() for entry, tensor in entries.items()}


def optimizer_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's settings as JSON values."""
    return json.loads(json.dumps(optimizer.state_dict()["param_groups"]))


def copied(sections: Sections) -> Sections:
    """Contiguous copies on the CPU, which later steps do not change and `save` can write without computing.

    A thread that once runs a PyTorch operator in parallel keeps its own pool of threads. OpenMP then has more threads
    than there are cores and lets waiting ones sleep, and training takes 1.6 times as long.
    """
    return {
        name: {key: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, t in part.items()}
        for name, part in sections.items()
    }


def not_finite(sections: Sections) -> str:
    """The name, `section/tensor`, of the first tensor that holds NaN or an infinity; empty if there is none."""
    floats = {
        f"{name}/{key}": t.detach()
        for name, part in sections.items()
        for key, t in part.items()
        if t.is_floating_point() and t.numel()
    }
    largest = torch._foreach_norm(list(floats.values()), float("inf")) if floats else ()
    return next((name for name, norm in zip(floats, largest, strict=True) if not norm.isfinite()), "")


def save(path: Path, sections: Sections, values: dict[str, Any]) -> None:
    """Write a checkpoint atomically. `values` must be JSON types.

    Raises `CheckpointError` if it cannot be written; a checkpoint already there stays as it was.
    """
    tensors = {f"{name}/{key}": t.detach().contiguous() for name, part in sections.items() for key, t in part.items()}
    header = {"format": FORMAT, "version": str(VERSION), "values": json.dumps(values)}
    try:
        write_tensors(path, _unshared(tensors), header)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}); an earlier checkpoint there is unharmed"
        ) from error


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, with those copied that share memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises `CheckpointError` if it is not one, is damaged, or has a newer version."""
    with _opened(path) as (file, values):
        return Checkpoint({key: file.get_tensor(key) for key in file.keys()}, values)  # noqa: SIM118


def load_values(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint, without reading its tensors. Raises as `load`."""
    with _opened(path) as (_, values):
        return values


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    if path.is_file():
        check_readable(path)
    advice = "; move it away to start the run from the beginning"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of a training run{advice}")
            if int(header["version"]) > VERSION:
                raise CheckpointError(f"{path} has format version {header['version']}; this gdd_fast reads {VERSION}")
            yield file, json.loads(header["values"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}){advice}") from error
