"""Networks on disk: a folder of config.json and model.safetensors, an EDM pickle, a training run, a pipeline folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gdd_fast.bundled import teacher_path
from gdd_fast.config import DEMO
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.layers.convolution import Conv2d, resample_kernel
from gdd_fast.models.edm import PUBLISHED, published
from gdd_fast.models.files import bare_weights, diffusers_folder, pickle_reader
from gdd_fast.models.files.pickle_reader import PickledNetwork
from gdd_fast.models.files.save import FORMAT, PRECONDS, VERSION
from gdd_fast.models.files.tensor_files import listed, misfits, read_tensor_file
from gdd_fast.models.precond import EDMPrecond, GDDPrecond, compute_dtype
from gdd_fast.models.preconditioned import Preconditioned, check_sigma_init
from gdd_fast.models.teachers.unet2d import UNet2DPrecond, output_gain

PICKLED_CLASSES: dict[str, type[EDMPrecond]] = {
    "EDMPrecond": EDMPrecond,  # EDM's networks and SiD's generators
    "GDDPrecond": GDDPrecond,
    "D2OPrecond": GDDPrecond,  # the same formula under the name of GDD's successor
}
RUN_GENERATOR = "generator_ema"
KINDS = "an EDM .pkl, a network folder, a training run folder or a diffusers pipeline folder"
Network = TypeVar("Network", bound=Preconditioned)


def load_network(folder: str | Path, device: torch.device | str | None = None) -> Preconditioned:
    """The network in `folder`, with float32 parameters whatever their stored dtype, in evaluation mode.

    Raises WeightsError if a file is missing or broken, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    path = folder / "model.safetensors"
    if not path.is_file():
        raise WeightsError(f"{folder} has no model.safetensors: the network was not saved completely; save it again.")
    return _build(PRECONDS[config["precond"]], config["init"], read_tensor_file(path), str(folder)).to(device)


def network_from_pickle(
    pickled: PickledNetwork,
    *,
    drop_augment: bool = False,
    dtype: torch.dtype | str = torch.float32,
    where: str | Path = "the pickle",
) -> EDMPrecond:
    """The network of a pickle, computing in `dtype`; without its augmentation layer if `drop_augment`. Errors call it
    `where`.

    Raises WeightsError for a network with another preconditioning (VP, VE, iDDPM, EDM2), or if the weights do not fit.
    """
    cls = PICKLED_CLASSES.get(pickled.class_name)
    if cls is None:
        edm2 = pickled.class_name == "Precond"
        raise WeightsError(
            f"{where} holds a {pickled.class_name}, but only {', '.join(PICKLED_CLASSES)} can be loaded: "
            + (
                "networks of EDM2 are not supported."
                if edm2
                else "choose one of EDM's own models, not one of its VP, VE or iDDPM baselines."
            )
        )
    init = {**pickled.init_kwargs, "dtype": dtype}
    state = dict(pickled.state_dict)
    if drop_augment:
        init.pop("augment_dim", None)
        state.pop("model.map_augment.weight", None)
    return _build(cls, init, state, str(where))


def load_generator(
    path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Preconditioned:
    """A network to sample from: an EDM or GDD .pkl, a network folder, a training run (its EMA generator), or a folder
    that diffusers' DDPMPipeline or a similar one wrote (see gdd_fast.models.teachers).

    It is called as `net(x, sigma, class_labels=None)`; it is in evaluation mode, frozen, without augmentation layer.
    `dtype` is the compute dtype (default: the one a folder was saved with, float32 for a .pkl).

    Raises WeightsError if there is no network at `path` or it is broken, UnsafePickleError for an unsafe .pkl, and
    ConfigError for an unknown `dtype`.
    """
    path = Path(path)
    net: Preconditioned
    if path.is_dir() and diffusers_folder.is_pipeline(path):
        init, state = diffusers_folder.read(path)
        net = _build(UNet2DPrecond, init, state, str(path))
    elif path.is_dir():
        folder = path / RUN_GENERATOR if (path / RUN_GENERATOR).is_dir() else path
        net = load_network(folder)
        if isinstance(net, EDMPrecond) and net.model_kwargs.get("augment_dim"):
            net = _rebuild(net, type(net), augment_dim=0)
    elif path.suffix.lower() == ".pkl" and path.is_file():
        networks = pickle_reader.load(path)
        if "ema" not in networks:
            raise WeightsError(f"{path} has no 'ema' network, only {', '.join(networks) or 'nothing'}.")
        net = network_from_pickle(networks["ema"], drop_augment=True, where=path)
    else:
        if path.is_file() and path.suffix.lower() in bare_weights.SUFFIXES:
            raise WeightsError(
                f"{path} holds weights alone: convert them once, naming their network, "
                f"python -m gdd_fast.convert {path} FOLDER --like NET|PRESET, and give that folder."
            )
        problem = "is not a network" if path.exists() else "does not exist"
        raise WeightsError(f"{path} {problem}: give {KINDS}.")
    if dtype is not None:
        net.dtype = compute_dtype(dtype)
    return net.to(device).eval().requires_grad_(False)


def network_like(path: Path, like: str, key: str = "ema") -> EDMPrecond:
    """The bare weights in `path` as the network that `like` names: a path for `load_generator`, one of EDM's files
    (edm-cifar10-32x32-cond-vp) or a preset (cifar10-cond). The augmentation layer is as in the file.

    Raises WeightsError for a file without such weights, an unknown name, or weights that do not fit the network.
    """
    state, augment_dim = bare_weights.read_bare(path, key)
    cls, init = EDMPrecond, published(like)
    if init is None:
        source = teacher_path(DEMO if like == f"{DEMO}-gdd" else like)  # the demo's presets, and any path
        if not source.exists():
            names = ", ".join(PUBLISHED)
            raise WeightsError(f"--like {like}: there is no such network; give a path, a preset's name, or {names}")
        other = load_generator(source)
        if not isinstance(other, EDMPrecond):
            raise WeightsError(f"--like {like}: that is a diffusers network, which has its own names for weights.")
        cls, init = type(other), other.init_config()
    return _build(cls, {**init, "augment_dim": augment_dim}, state, f"{path} as {like}")


def network_digest(net: Preconditioned) -> str:
    """SHA-256 of weights and configuration, except the compute dtype: equal for equal functions."""
    kind = {"class": type(net).__name__, **net.init_config(), "dtype": None}
    digest = hashlib.sha256(json.dumps(kind, sort_keys=True).encode())
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def holds_network(net: Preconditioned, folder: str | Path) -> bool:
    """Whether `folder` holds exactly this network, bit for bit, as `save_network` writes it in float32."""
    try:
        saved = load_network(folder)
    except WeightsError:
        return False
    return type(saved) is type(net) and network_digest(saved) == network_digest(net)


def as_generator(teacher: Preconditioned, sigma_init: float | None = None) -> Preconditioned:
    """A one-step generator that starts from copies of the teacher's weights, without augmentation layer and dropout.

    A network of EDM gets GDD's preconditioning, any other keeps its own. `sigma_init` is the noise level of the one
    step, by default the teacher's; ConfigError if the teacher does not support it. The result is on the teacher's
    device, in training mode.
    """
    wanted = teacher.sigma_init if sigma_init is None else sigma_init
    if isinstance(teacher, EDMPrecond):
        changes = {"augment_dim": 0, "dropout": 0.0, "label_dropout": 0.0, "sigma_init": wanted}
        return _rebuild(teacher, GDDPrecond, **changes).train()
    check_sigma_init(wanted, teacher.sigma_min, teacher.sigma_max)
    init = teacher.init_config()
    init |= {"unet": {**init["unet"], "dropout": 0.0}, "sigma_init": wanted}
    generator = _build(UNet2DPrecond, init, teacher.state_dict(), "the network")
    generator.scale_output(output_gain(generator))
    return generator.train()


def _rebuild(net: EDMPrecond, cls: type[EDMPrecond], **changes: Any) -> EDMPrecond:
    init = {**net.init_config(), **changes}
    if cls is not type(net):
        del init["sigma_eps"]
    state = net.state_dict()
    if not init.get("augment_dim"):
        state.pop("model.map_augment.weight", None)
    return _build(cls, init, state, "the network")


def _read_config(path: Path) -> dict[str, Any]:
    where = f"{path.parent} is not a network folder"
    if not path.is_file():
        raise WeightsError(f"{where}: it has no config.json. Give the folder that holds it and model.safetensors.")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}).") from error
    if isinstance(config, dict) and "discriminator" in config:
        raise WeightsError(f"{path.parent} is a training run without a generator yet: its first checkpoint writes one.")
    if isinstance(config, dict) and "format" not in config and (path.parent / "teacher").is_dir():
        raise WeightsError(f"{path.parent} is a pretraining run: give its network folder, {path.parent / 'teacher'}.")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{where}: its config.json does not have the format {FORMAT!r}.")
    if config.get("version") != VERSION:
        raise WeightsError(
            f"{path} has version {config.get('version')!r}, but this program reads version {VERSION}: update gdd_fast."
        )
    unknown = sorted(set(config) - {"format", "version", "precond", "init"})
    if unknown:
        raise WeightsError(f"{path} has unknown keys {', '.join(unknown)}: remove them, or update gdd_fast.")
    if config.get("precond") not in list(PRECONDS):
        raise WeightsError(f"{path}: 'precond' must be one of {', '.join(PRECONDS)}, got {config.get('precond')!r}.")
    if not isinstance(config.get("init"), dict):
        raise WeightsError(f"{path}: 'init' must hold the network's arguments.")
    return config


def _build(cls: type[Network], init: dict[str, Any], state: dict[str, Tensor], where: str) -> Network:
    """A network of class `cls` with float32 copies of the tensors in `state`, in evaluation mode.

    The arguments may be anything that a file can hold. The network is built without memory for its weights, within the
    bounds of `gdd_fast.models.arguments`, and gets the file's tensors only if they match its own.
    """
    try:
        with torch.device("meta"):
            net = cls(**init)
    except (ConfigError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise WeightsError(f"{where}: the network cannot be built from its arguments: {error}") from error
    _check_state(net, state, where)
    net.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, assign=True)
    _fill_buffers(net, lambda: cls(**init))
    return net.eval()


def _fill_buffers(net: nn.Module, anew: Callable[[], nn.Module]) -> None:
    """Give buffers that no file holds, as in some diffusers layers, their initial values."""
    empty = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    made = anew() if empty else net
    for name in empty:
        module, _, buffer = name.rpartition(".")
        net.get_submodule(module)._buffers[buffer] = made.get_buffer(name)


def _check_state(net: Preconditioned, state: dict[str, Tensor], where: str) -> None:
    """Raise one WeightsError for all differences between `state` and the tensors of `net` (on any device)."""
    problems = misfits(net.state_dict(), state)
    problems += [f"{name} is {t.dtype}, not floating point" for name, t in state.items() if not t.is_floating_point()]
    if not problems:
        problems += [f"{name} is not the filter {list(taps)}" for name, taps in _filters(net, state)]
    if problems:
        raise WeightsError(f"{where}: the weights do not fit the network: {listed(problems)}.")


def _filters(net: Preconditioned, state: dict[str, Tensor]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The resampling filters whose stored values differ from those of the network's arguments."""
    for name, layer in net.named_modules():
        if isinstance(layer, Conv2d) and layer.resample_filter is not None:
            stored = state[f"{name}.resample_filter"].to("cpu", torch.float32)
            # The tolerance allows for filters that were stored in half precision.
            if not torch.allclose(stored, resample_kernel(layer.taps), rtol=1e-2):
                yield f"{name}.resample_filter", layer.taps
