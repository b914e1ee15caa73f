"""Network pickles of EDM and GDD, read without running anything in them.

Loaded the ordinary way, such a file executes the Python source code it carries. Here its opcodes are evaluated by
`Machine`, which knows only the globals that these files contain, each as an inert stand-in; the source code is skipped,
and the tensors are rebuilt from their bytes.

Such a file is a dict with `ema` and, in training snapshots, `net`, `loss_fn`, `augment_pipe` and `dataset_kwargs`. An
object in it is `torch_utils.persistence._reconstruct_persistent_obj(meta)` with meta = {type: "class", version: 6,
module_src, class_name, state}, and the state of a network is the `__dict__` of a torch.nn.Module.
"""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gdd_fast.errors import UnsafePickleError, WeightsError
from gdd_fast.models.files.pickle_globals import (
    MAX_DEPTH,
    MAX_TEXT,
    Budget,
    Module,
    WithLayers,
    globals_of_a_file,
    is_text,
    kind_of,
    set_type,
)
from gdd_fast.models.files.pickle_machine import Constructor, Machine, Reader
from gdd_fast.models.files.pickle_tensors import PickledTensor

MAX_FILE_BYTES = 8 * 2**30
MIN_PROTOCOL = 4
# The order of EDMPrecond's and GDDPrecond's arguments, for files that recorded them by position.
PRECOND_ARGUMENTS = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
)
KNOWN_FORMATS = (
    (b"PK\x03\x04", "a zip archive (a torch.save checkpoint or a data set)"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"<", "a web page (the download failed)"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
)


@dataclass(frozen=True)
class PickledNetwork:
    """One network of the file.

    `class_name`: the network's class, e.g. "EDMPrecond". `init_kwargs`: its constructor's arguments, as plain JSON
    types. `state_dict`: the parameters and persistent buffers under their dotted names; contiguous CPU tensors, none
    sharing memory with another.
    """

    class_name: str
    init_kwargs: dict[str, object]
    state_dict: dict[str, torch.Tensor]


def load(path: str | Path, *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, PickledNetwork]:
    """Read every network (module with parameters) of an EDM or GDD network pickle, by key, e.g. "ema".

    Nothing in the file is executed; other entries (loss, augmentation, data set options) are skipped.
    Raises `WeightsError` if there is no such file or it is larger than `max_bytes`, and `UnsafePickleError` if it is
    not such a pickle, is damaged, or holds anything that a pickled EDM network would not.
    """
    path = Path(path)
    data = _read(path, max_bytes)
    try:
        return _networks(data)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None


def load_module(path: str | Path, *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, torch.Tensor]:
    """The state dict of a pickle that is a single network, such as NVIDIA's feature networks for metrics.

    As in `load`, nothing is executed; same errors. It may contain layers of torch.nn.
    """
    path = Path(path)
    data = _read(path, max_bytes)
    try:
        content = _content(data, WithLayers(globals_of_a_file()))
        if not isinstance(content, Module):
            raise UnsafePickleError(f"the file holds a {kind_of(content)}, not a network")
        return _state_dict("the network", content, Budget(tensor_bytes=2 * len(data)))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None


def load_layers(path: str | Path, *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts, by key, of a pickle that is a dict of torch.nn layers, such as StyleGAN-XL's class table.

    As in `load`, nothing is executed; same errors. It may use protocol 3 and dill's name for the type set.
    """
    path = Path(path)
    data = _read(path, max_bytes)
    try:
        names = WithLayers({**globals_of_a_file(), "dill._dill._load_type": Constructor(set_type)})
        content = _content(data, names, min_protocol=3)
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UnsafePickleError(f"the file holds a {kind_of(content)}, not a dict of layers")
        budget = Budget(tensor_bytes=2 * len(data))
        return {k: _state_dict(k, layer, budget) for k, layer in content.items() if isinstance(layer, Module)}
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None


def _read(path: Path, max_bytes: int) -> memoryview:
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: there is no such file; give the path of an EDM or GDD network pickle (.pkl)")
        size = path.stat().st_size
        if size > max_bytes:
            raise WeightsError(f"{path}: {size} bytes, more than the {max_bytes} that a network pickle may have here")
        data = bytearray(size)
        with path.open("rb") as file:
            count = file.readinto(data)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    return memoryview(data)[:count]


def _content(data: memoryview, names: Mapping[str, object], min_protocol: int = MIN_PROTOCOL) -> object:
    if not len(data):
        raise UnsafePickleError("the file is empty; get it again")
    start = bytes(data[:32])
    for signature, name in KNOWN_FORMATS:
        if start.startswith(signature):
            raise UnsafePickleError(f"this is {name}, not an EDM or GDD network pickle (.pkl)")
    if start[0] != pickle.PROTO[0] or len(start) < 2:
        raise UnsafePickleError("this is not a pickle; give an EDM or GDD network pickle (.pkl)")
    if start[1] < min_protocol:
        raise UnsafePickleError(
            f"this is a pickle of protocol {start[1]}, as old torch.save checkpoints are; EDM and GDD network pickles "
            f"(.pkl) have protocol {min_protocol} or later"
        )
    return Machine(Reader(data), names).load()


def _networks(data: memoryview) -> dict[str, PickledNetwork]:
    content = _content(data, globals_of_a_file())
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UnsafePickleError(
            f"the file holds a {kind_of(content)}; a network pickle holds a dict with an entry 'ema'"
        )
    budget = Budget(tensor_bytes=2 * len(data))
    networks = {}
    barren: set[int] = set()
    for key, value in content.items():
        if isinstance(value, Module) and value.class_name is not None and _has_parameters(value, budget, barren):
            networks[key] = _network(key, value, budget)
    if not networks:
        found = ", ".join(f"{key[:40]!a} ({kind_of(value)})" for key, value in list(content.items())[:10])
        raise UnsafePickleError(f"the file holds no network; it holds {found or 'nothing'}")
    return networks


def _modules(root: Module, budget: Budget) -> Iterator[tuple[str, Module]]:
    """The module and all its submodules, with the prefix of their names, in the order of torch.nn.Module.state_dict."""
    pending = [("", 0, root)]
    while pending:
        prefix, depth, module = pending.pop()
        budget.spend("modules")
        if depth > MAX_DEPTH:
            raise UnsafePickleError(f"the modules of the network are nested more than {MAX_DEPTH} deep")
        _check_name(prefix)
        yield prefix, module
        children = _children(module, budget).items()
        pending.extend([(f"{prefix}{name}.", depth + 1, child) for name, child in children][::-1])


def _children(module: Module, budget: Budget) -> dict[str, Module]:
    children = module.members("_modules", budget)
    for name, child in children.items():
        if not isinstance(child, Module):
            raise UnsafePickleError(f"module {name!a} is a {kind_of(child)}")
    return children


def _check_name(full: str) -> None:
    if len(full) > MAX_TEXT:
        raise UnsafePickleError(f"the name {full[:MAX_TEXT]!a}... is longer than {MAX_TEXT} characters")


def _has_parameters(root: Module, budget: Budget, barren: set[int]) -> bool:
    """Whether the object is a network: a loss is not a module, and an augmentation pipe has only buffers.

    `barren`: ids of modules known to have no parameters in or below them. Modules searched in vain are added, so that
    shared ones are searched only once.
    """
    if not isinstance(root.state.get("_modules"), dict):
        return False
    seen: set[int] = set()
    pending = [root]
    while pending:
        module = pending.pop()
        if id(module) in barren or id(module) in seen:
            continue
        seen.add(id(module))
        budget.spend("modules")
        if module.members("_parameters", budget):
            return True
        pending.extend(_children(module, budget).values())
    barren |= seen
    return False


def _network(key: str, root: Module, budget: Budget) -> PickledNetwork:
    state = _state_dict(key, root, budget)
    return PickledNetwork(root.class_name, _settings(root, budget), state)  # type: ignore[arg-type]


def _state_dict(key: str, root: Module, budget: Budget) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for prefix, module in _modules(root, budget):
        skipped = module.state.get("_non_persistent_buffers_set", set())
        if not isinstance(skipped, set):
            raise UnsafePickleError(f"_non_persistent_buffers_set of a module is a {kind_of(skipped)}")
        parameters = module.members("_parameters", budget)
        buffers = {name: value for name, value in module.members("_buffers", budget).items() if name not in skipped}
        for name, value in (*parameters.items(), *buffers.items()):
            full = prefix + name
            _check_name(full)
            shown = ascii(full)
            if not isinstance(value, PickledTensor):
                raise UnsafePickleError(f"{key[:40]!a}: {shown} is a {kind_of(value)}, not a tensor")
            if full in state:
                raise UnsafePickleError(f"{key[:40]!a}: {shown} occurs twice")
            if name in parameters and not value.storage.dtype.is_floating_point:
                raise UnsafePickleError(
                    f"{key[:40]!a}: parameter {shown} has dtype {value.storage.dtype}, not a floating-point one"
                )
            budget.spend("tensors")
            budget.spend("tensor_bytes", value.bytes)
            state[full] = value.materialise()
    return state


def _settings(root: Module, budget: Budget) -> dict[str, object]:
    """The constructor's arguments, by name."""
    arguments = root.state.get("_init_args")
    keywords = root.state.get("_init_kwargs")
    if not isinstance(arguments, tuple) or not isinstance(keywords, dict):
        raise UnsafePickleError(
            f"{root.class_name} was saved without its constructor's arguments; it cannot be rebuilt"
        )
    if arguments and (
        root.class_name not in ("EDMPrecond", "GDDPrecond", "D2OPrecond") or len(arguments) > len(PRECOND_ARGUMENTS)
    ):
        raise UnsafePickleError(
            f"{root.class_name} was made with {len(arguments)} positional arguments, whose names are not known"
        )
    positional = dict(zip(PRECOND_ARGUMENTS, arguments, strict=False))
    for name in keywords:
        if not is_text(name) or name in positional:
            raise UnsafePickleError(
                f"{root.class_name} was saved with an impossible constructor argument: {name!a:.100}"
            )
    return {name: _plain(value, name, budget) for name, value in {**positional, **keywords}.items()}


def _plain(value: object, name: str, budget: Budget, depth: int = 0) -> object:
    """The value as JSON types, with tuples as lists."""
    budget.spend("settings")
    if value is None or isinstance(value, bool | int | float) or is_text(value):
        return value
    if depth < MAX_DEPTH and isinstance(value, list | tuple):
        return [_plain(item, name, budget, depth + 1) for item in value]
    if depth < MAX_DEPTH and isinstance(value, dict) and all(map(is_text, value)):
        return {key: _plain(item, name, budget, depth + 1) for key, item in value.items()}
    raise UnsafePickleError(
        f"constructor argument {name!a} holds a {kind_of(value)}, is nested more than {MAX_DEPTH} deep or has text of "
        f"more than {MAX_TEXT} characters; a network's settings are numbers, short strings, lists and dicts"
    )
