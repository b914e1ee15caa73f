"""What a network pickle of EDM or GDD may contain: the globals it may name, each with an inert stand-in, and limits.

A global that is not in `GLOBALS` is refused by `Machine.find_global` (pickle_machine.py).
"""

from dataclasses import dataclass

from gdd_fast.errors import UnsafePickleError
from gdd_fast.models.files.pickle_machine import Constructor, StandIn
from gdd_fast.models.files.pickle_tensors import NumpyType, PickledTensor, Storage, Storages, numpy_scalar

PERSISTENCE_VERSION = 6
# Bounds for all networks of a file together, so that shared or circular references, which cost a file nothing, cannot
# unfold into more than it holds.
MAX_MODULES = 10_000
MAX_MEMBERS = 100_000  # entries of modules' dicts that are visited
MAX_TENSORS = 10_000
MAX_SETTINGS = 10_000
MAX_DEPTH = 32
MAX_TEXT = 200  # characters in a dotted name or a setting; EDM's longest have about forty


@dataclass
class Budget:
    """How much may still be unfolded from the file, over everything that is done with it."""

    tensor_bytes: int
    tensors: int = MAX_TENSORS
    modules: int = MAX_MODULES
    members: int = MAX_MEMBERS
    settings: int = MAX_SETTINGS

    def spend(self, what: str, count: int = 1) -> None:
        left = getattr(self, what) - count
        if left < 0:
            raise UnsafePickleError(f"the networks in the file unfold into too many {what.replace('_', ' ')}")
        setattr(self, what, left)


class Module(StandIn):
    """An object of the file: its class's name (None for a plain torch.nn container) and its `__dict__`."""

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str | None, state: dict) -> None:
        self.class_name = class_name
        self.state = state

    @classmethod
    def persistent(cls, arguments: tuple) -> "Module":
        """For `torch_utils.persistence._reconstruct_persistent_obj(meta)`."""
        match arguments:
            case ({"type": "class", "version": version, "class_name": str(name), "state": dict(state)},):
                if version != PERSISTENCE_VERSION or type(version) is not int:
                    raise UnsafePickleError(
                        f"an object in the file has another persistence version than {PERSISTENCE_VERSION}, the one of "
                        "EDM and GDD; it is from another project"
                    )
                if len(name) > 100 or not name.isidentifier() or not name.isascii():
                    raise UnsafePickleError(f"an object in the file has the class name {name[:100]!a}")
                return cls(name, state)
        raise UnsafePickleError(
            "an object in the file lacks one of type = 'class', version, class_name and state; the file is corrupt or "
            "from another project"
        )

    @classmethod
    def container(cls, arguments: tuple) -> "Module":
        """For `torch.nn.modules.container.ModuleDict`, whose state comes with BUILD."""
        if arguments:
            raise UnsafePickleError("torch.nn.modules.container.ModuleDict is made with arguments")
        return cls(None, {})

    def build(self, state: object) -> None:
        if self.class_name is not None or self.state or not isinstance(state, dict):
            raise UnsafePickleError("the file sets an object's state twice, or to something that is not a dict")
        self.state = state

    def members(self, name: str, budget: Budget) -> dict:
        """`_parameters`, `_buffers` or `_modules`, with the entries that are None left out."""
        members = self.state.get(name)
        if not isinstance(members, dict):
            raise UnsafePickleError(f"a {self.class_name or 'ModuleDict'} in the file has no dict {name}")
        budget.spend("members", len(members))
        for key in members:
            if not is_text(key) or not key or "." in key:
                raise UnsafePickleError(f"a {self.class_name or 'ModuleDict'} in the file has a bad name in {name}")
        return {key: value for key, value in members.items() if value is not None}


def _empty_dict(arguments: tuple) -> dict:
    if arguments:
        raise UnsafePickleError("a dict in the file is made with arguments")
    return {}


def set_type(arguments: tuple) -> Constructor:
    """For dill's `_load_type("set")`; what it makes is a plain set."""
    if arguments != ("set",):
        raise UnsafePickleError("the file asks dill for another type than set")
    return Constructor(_plain_set)


def _plain_set(arguments: tuple) -> set:
    match arguments:
        case () | ([],):
            return set()
        case (list(names),) if all(isinstance(name, str) for name in names):
            return set(names)
    raise UnsafePickleError("a set in the file is not one of names")


GLOBALS: dict[str, Constructor] = {
    name: Constructor(make)
    for name, make in {
        "collections.OrderedDict": _empty_dict,
        "dnnlib.util.EasyDict": _empty_dict,
        "torch_utils.persistence._reconstruct_persistent_obj": Module.persistent,
        "torch.nn.modules.container.ModuleDict": Module.container,
        "torch._utils._rebuild_tensor_v2": PickledTensor.from_arguments,
        "torch._utils._rebuild_parameter": PickledTensor.from_parameter,
        "numpy.dtype": NumpyType,
        "numpy.core.multiarray.scalar": numpy_scalar,
        "numpy._core.multiarray.scalar": numpy_scalar,
    }.items()
}


def globals_of_a_file() -> dict[str, object]:
    """The globals for one file, whose storages are each read once."""
    return {**GLOBALS, "torch.storage._load_from_bytes": Constructor(Storages())}


class WithLayers(dict):
    """`GLOBALS`, plus any layer of torch.nn as a plain container."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith("torch.nn.modules."))

    def __missing__(self, name: str) -> Constructor:
        return Constructor(Module.container)


def is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def kind_of(value: object) -> str:
    """What the value was in the file, for messages."""
    if isinstance(value, Module):
        return value.class_name or "ModuleDict"
    names = {PickledTensor: "tensor", Storage: "tensor storage", memoryview: "bytes"}
    return names.get(type(value), type(value).__name__)
