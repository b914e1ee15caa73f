"""Finds the weights of feature networks, and tells whether they are the published ones.

A file is searched for at a given path, or else in the folders of the environment variable GDD_FAST_WEIGHTS, in
packages, and in the cache folders of projects that fetch the same file. Nothing is downloaded here: a metric must not
depend on a server's answer.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.errors import UnsafePickleError, WeightsError
from gdd_fast.models.backbone_weights import read_tensors
from gdd_fast.models.files.numpy_pickle import load_arrays
from gdd_fast.models.files.pickle_reader import load_module
from gdd_fast.models.files.script_tensors import is_torchscript, load_torchscript

FOLDERS = "GDD_FAST_WEIGHTS"
"""Environment variable: folders with weight files, separated as in PATH."""


@dataclass(frozen=True)
class WeightFile:
    """A network's weights as others distribute them."""

    network: str
    names: tuple[str, ...]
    """File names; error messages suggest the first."""
    origin: str
    """Where a user gets one."""
    in_packages: tuple[tuple[str, str], ...] = ()
    """(package, path within it) of packages that contain the file."""
    caches: tuple[str, ...] = ()
    """Patterns of paths, such as `~/.cache/x/*_file.pt`."""
    digests: frozenset[str] = frozenset()
    """`digest` of the published weights, in each precision in which they are distributed."""

    def find(self, override: str | Path | None = None) -> Path:
        """The path of the file; `override` is the path that the user gave.

        Raises `WeightsError` if there is none: one line with the name, the origin and where to put it.
        """
        if override is not None:
            path = Path(override)
            if not path.is_file():
                raise WeightsError(f"{path}: there is no such file; it should hold the weights of {self.network}")
            return path
        for path in self._candidates():
            if path.is_file():
                return path
        raise WeightsError(
            f"the weights of {self.network} are missing: get {self.names[0]} ({self.origin}), and pass "
            f"--feature-weights {self.network}=PATH or put it in a folder named by {FOLDERS}"
        )

    def _candidates(self) -> Iterable[Path]:
        for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
            yield from (Path(folder).expanduser() / name for name in self.names)
        for package, inside in self.in_packages:
            spec = importlib.util.find_spec(package)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                yield from sorted(Path(folder).glob(inside))
        for pattern in (*self.caches, *(f"{torch.hub.get_dir()}/checkpoints/{name}" for name in self.names)):
            path = Path(os.path.expandvars(pattern)).expanduser()
            yield from sorted(path.parent.glob(path.name))

    def read(self, override: str | Path | None = None) -> dict[str, Tensor]:
        """The tensors, named as the file's format has them; nothing in it is executed. Raises as `read_weights`."""
        return read_weights(self.find(override))

    def name_of(self, weights: Mapping[str, Tensor], resolution: int) -> str:
        """`network-resolution`, followed by the start of the digest if these are not the published weights.

        So measurements with different weights of one architecture are never compared.
        """
        found = digest(weights)
        return f"{self.network}-{resolution}" + ("" if found in self.digests else f"-{found[:8]}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file of any supported format; nothing in it is executed.

    Raises `WeightsError` or `UnsafePickleError`, whose messages begin with the path.
    """
    try:
        return _read(path)
    except (WeightsError, UnsafePickleError) as error:
        message = str(error)
        raise type(error)(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _read(path: Path) -> dict[str, Tensor]:
    """Read by format: TorchScript, NVIDIA's pickle of a network, a pickle of arrays, or plain tensors."""
    if is_torchscript(path):
        return load_torchscript(path)
    if path.suffix.lower() == ".pkl":
        return load_module(path)
    if path.suffix.lower() == ".ckpt":
        return {name: torch.from_numpy(array.copy()) for name, array in load_arrays(path).items()}
    return read_tensors(path)


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of names, shapes and float32 values, independent of the file format.

    Batch counters of batch norms, which do not affect results and which older files lack, are left out.
    """
    total = hashlib.sha256()
    for name in sorted(weights):
        if name.endswith("num_batches_tracked"):
            continue
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(value.numpy())
    return total.hexdigest()
