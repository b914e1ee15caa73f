"""Reads the tensors of a TorchScript archive (torch.jit.save) without building the program in it.

`Machine` follows only the tree of modules, and the tensors in it are rebuilt from their bytes.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.errors import UnsafePickleError
from gdd_fast.models.files.pickle_machine import Constructor, Machine, Reader, StandIn
from gdd_fast.models.files.pickle_tensors import STORAGE_TYPES, PickledTensor, Storage

MAX_VALUES = 100_000  # in all modules together, so that shared ones cannot unfold into more than the file holds
MAX_DEPTH = 32
MAX_EXPANSION = 10  # weights hardly compress


class _Object(StandIn):
    """A module of the archive, of any class: its `__dict__`."""

    __slots__ = ("state",)

    def __init__(self, arguments: tuple) -> None:
        if arguments:
            raise UnsafePickleError("a module in the archive is made with arguments")
        self.state: dict = {}

    def build(self, state: object) -> None:
        if not isinstance(state, dict):
            raise UnsafePickleError("a module in the archive has a state that is not a dict")
        self.state = state


def _numbers(arguments: tuple) -> list:
    """For `torch.jit._pickle.build_intlist([...])` and its relatives."""
    match arguments:
        case (list(values),):
            return values
    raise UnsafePickleError("a list in the archive is made of something else")


class _Names(Mapping):
    """The globals of a TorchScript archive: classes that it defines itself, and functions that rebuild tensors."""

    _fixed: Mapping[str, object] = {
        "torch._utils._rebuild_tensor_v2": Constructor(PickledTensor.from_arguments),
        "collections.OrderedDict": Constructor(lambda arguments: {}),
        **{
            f"torch.jit._pickle.build_{kind}list": Constructor(_numbers) for kind in ("int", "double", "bool", "tensor")
        },
        **STORAGE_TYPES,
    }

    def __contains__(self, name: object) -> bool:
        return name in self._fixed or (isinstance(name, str) and name.startswith("__torch__."))

    def __getitem__(self, name: str) -> object:
        return self._fixed.get(name) or Constructor(_Object)

    def __iter__(self):
        return iter(self._fixed)

    def __len__(self) -> int:
        return len(self._fixed)


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive written by torch.jit.save."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by dotted names, in the order of the modules.

    Nothing in the file is executed. Raises `UnsafePickleError` if it is damaged or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_EXPANSION * path.stat().st_size:
                raise UnsafePickleError(f"the archive unpacks into {size} bytes, more than any network's would")
            return _tensors(_root(archive), 2 * size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnsafePickleError(f"{path} is a damaged TorchScript archive: {error}") from None


def _root(archive: zipfile.ZipFile) -> _Object:
    data_name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if data_name is None:
        raise UnsafePickleError("the archive has no data.pkl")
    folder = data_name.removesuffix("data.pkl")
    storages: dict[str, Storage] = {}

    def storage(identity: object) -> Storage:
        match identity:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(count)):
                if key not in storages:
                    storages[key] = Storage(memoryview(bytearray(archive.read(f"{folder}data/{key}"))), dtype)
                if len(storages[key].data) != count * dtype.itemsize:
                    raise UnsafePickleError(f"storage {key!a} of the archive does not have {count} elements")
                return storages[key]
        raise UnsafePickleError("the archive refers to something that is not a storage")

    root = Machine(Reader(memoryview(archive.read(data_name))), _Names(), persistent=storage).load()
    if not isinstance(root, _Object):
        raise UnsafePickleError("the archive holds something that is not a module")
    return root


def _tensors(root: _Object, max_bytes: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    pending: list[tuple[str, int, object]] = [("", 0, root)]
    values = 0
    while pending:
        name, depth, value = pending.pop()
        values += 1
        if isinstance(value, PickledTensor):
            max_bytes -= value.bytes
            if max_bytes < 0:
                raise UnsafePickleError("the archive unfolds into more tensors than it holds")
            found[name] = value.materialise()
        elif isinstance(value, _Object):
            if depth > MAX_DEPTH or values + len(pending) + len(value.state) > MAX_VALUES:
                raise UnsafePickleError("the modules of the archive are nested too deep, or unfold into too many")
            prefix = f"{name}." if name else ""
            pending.extend((prefix + str(key), depth + 1, item) for key, item in reversed(value.state.items()))
    return found
