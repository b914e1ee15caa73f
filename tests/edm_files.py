"""Network pickles in the form of EDM's, made without EDM's code."""

import contextlib
import io
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gdd_fast.errors import UnsafePickleError
from gdd_fast.models.files.pickle_reader import load

NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # numpy.core.multiarray.scalar, wherever this NumPy has it


def _reconstruct_persistent_obj(meta):
    """Like the function of this name that files refer to: loading the ordinary way runs the source in the file."""
    exec(meta["module_src"], {})
    return types.SimpleNamespace(**meta["state"])


class EasyDict(dict):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """While a pickle is written or loaded the ordinary way, its globals must be importable."""
    modules = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib.util", "dnnlib")
    }
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Reduced:
    """Pickles as the call `function(*arguments)`."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Persistent:
    """Pickles as a persistent object, whose meta can be changed by `meta`."""

    def __init__(self, class_name: str, state: object, module_src: str = "", **meta) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}
        self.meta.update(meta)

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def network(module: nn.Module, class_name: str, init_kwargs: dict, *, init_args: tuple = (), module_src: str = ""):
    """`module` as EDM's training loop would pickle it: every module persistent but the ModuleDicts."""
    own = set(nn.Module().__dict__)

    def convert(module: nn.Module, name: str, arguments: tuple, keywords: dict):
        state = {key: value for key, value in module.__dict__.items() if key in own}
        children = {
            key: child and convert(child, type(child).__name__, (), {}) for key, child in module._modules.items()
        }
        if isinstance(module, nn.ModuleDict):
            container = nn.ModuleDict()
            container.__dict__["_modules"] = children
            return container
        state |= {"_modules": children, "skip_scale": np.sqrt(0.5), "heads": 1, "_init_args": arguments}
        return Persistent(name, state | {"_init_kwargs": keywords}, module_src)

    return convert(module, class_name, init_args, init_kwargs)


class Tiny(nn.Module):
    """A few parameters and buffers in nested modules."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"8x8_conv": nn.Conv2d(2, 3, 3), "8x8_norm": nn.BatchNorm2d(3)})
        self.out = nn.Linear(3, 2, bias=False)
        self.register_buffer("freqs", torch.arange(4.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.unused = None
        self.register_parameter("skip", None)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))


TINY_ARGUMENTS = {
    "img_resolution": 8,
    "img_channels": 2,
    "sigma_data": 0.5,
    "channel_mult": [1, 2],
    "init": {"a": None},
}


def tiny(module: nn.Module | None = None, class_name: str = "EDMPrecond", **options):
    """A `Tiny` (or `module`) as a pickled network."""
    return network(module or Tiny(), class_name, dict(TINY_ARGUMENTS), **options)


def dumps(content: object, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    with importable():
        pickle.Pickler(file, protocol).dump(content)
    return file.getvalue()


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, protocol))
    return path


def refused(tmp_path: Path, content: object, match: str) -> None:
    """Asserts that `load` refuses a file of `content` with its path and a message that matches."""
    path = write(tmp_path / "refused.pkl", content)
    with pytest.raises(UnsafePickleError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def with_parameter(value: object) -> dict:
    """A network with `value` in the place of the parameter out.weight."""
    network = tiny()
    network.meta["state"]["_modules"]["out"].meta["state"]["_parameters"]["weight"] = value
    return {"ema": network}


def storage_of(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


def literal(text: str) -> bytes:
    """The opcode that pushes a short string."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()
