"""Convert networks between pickles, folders and state_dict files: `python -m gdd_fast.convert SOURCE DESTINATION`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gdd_fast.cli import command, start

with start(__name__):
    import torch
    import tyro

    from gdd_fast.errors import ConfigError, WeightsError
    from gdd_fast.files import atomic_folder, atomic_write, check_destination, check_writable, write_tensors
    from gdd_fast.models.files import pickle_reader
    from gdd_fast.models.files.bare_weights import SUFFIXES
    from gdd_fast.models.files.diffusers_folder import is_pipeline
    from gdd_fast.models.files.load import (
        RUN_GENERATOR,
        load_generator,
        load_network,
        network_from_pickle,
        network_like,
    )
    from gdd_fast.models.files.save import save_network
    from gdd_fast.models.preconditioned import Preconditioned
    from gdd_fast.settings import Settings

STATE_DICT_SUFFIXES = (".safetensors", ".pt")
OTHER_SUFFIXES = (".pkl", ".pth", ".ckpt", ".bin", ".zip")  # as a destination, these mean a file, not a folder


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Convert an EDM or GDD .pkl, a network folder or a run to a folder, or to a state_dict file with EDM's names."""

    source: tyro.conf.Positional[Path]
    """EDM, GDD, D2O or SiD .pkl (nothing in it is executed), network folder, or training run folder (its EMA
    generator); or, with --like, a file of weights alone under EDM's names: .safetensors, .pt or .pth."""
    destination: tyro.conf.Positional[Path]
    """New folder for config.json and model.safetensors; or a state_dict file, .safetensors or .pt (plain tensors)."""
    key: str = "ema"
    """Which network of a file that holds several; training snapshots have `ema` and `net`."""
    like: str | None = None
    """The network that weights alone belong to: a path to such a network, EDM's name for it
    (edm-cifar10-32x32-cond-vp), or a preset (cifar10-cond)."""
    dtype: Literal["float32", "float16"] = "float32"
    """How a folder stores the weights. They are float32 again when loaded; what float16 rounds off is lost."""
    overwrite: bool = False
    """Replace what is at the destination."""

    @property
    def to_state_dict(self) -> bool:
        return self.destination.suffix.lower() in STATE_DICT_SUFFIXES

    @property
    def bare(self) -> bool:
        return not self.source.is_dir() and self.source.suffix.lower() in SUFFIXES

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work, before the network is read."""
        destination, wanted = self.destination, " or ".join(STATE_DICT_SUFFIXES)
        if self.bare and self.like is None:
            raise ConfigError(f"{self.source} holds weights alone: pass --like NET|PRESET to say of which network")
        if self.like is not None and not self.bare:
            raise ConfigError(f"--like is for weights alone ({', '.join(SUFFIXES)}); {self.source} says what it is")
        if destination.suffix.lower() in OTHER_SUFFIXES:
            raise ConfigError(f"{destination}: give a folder's name, or a state_dict file that ends in {wanted}")
        if destination.resolve() == self.source.resolve():
            raise ConfigError(f"{destination} is the source itself: give another destination")
        if self.to_state_dict and self.dtype != "float32":
            raise ConfigError(f"a state_dict file is float32, like EDM's networks: leave out --dtype {self.dtype}")
        if destination.exists():
            if destination.is_dir() == self.to_state_dict:
                kind = "folder" if self.to_state_dict else "file"
                raise ConfigError(f"{destination} exists and is a {kind}: give another destination")
            if not self.overwrite and (self.to_state_dict or any(destination.iterdir())):
                raise ConfigError(f"{destination} exists: give another destination, or --overwrite to replace it")
        (check_destination if self.to_state_dict else check_writable)(destination)


def convert(config: ConvertConfig) -> Preconditioned:
    """Write the network at `config.source` to `config.destination`, whole or not at all, and return it.

    Raises ConfigError for options that cannot work, WeightsError for a source without such a network, and
    UnsafePickleError for a pickle that is damaged or holds anything else.
    """
    config.validate()
    if config.like is not None:
        net = network_like(config.source, config.like, config.key)
    else:
        net = _read(config.source, config.key)
    if not config.to_state_dict:
        dtype = getattr(torch, config.dtype)
        if config.destination.exists() and any(config.destination.iterdir()):  # --overwrite
            save_network(net, config.destination, dtype=dtype)
        else:
            with atomic_folder(config.destination) as folder:
                save_network(net, folder, dtype=dtype)
        return net
    state = {name: tensor.detach().contiguous() for name, tensor in net.state_dict().items()}
    if config.destination.suffix.lower() == ".pt":
        with atomic_write(config.destination, new=not config.overwrite) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)  # to a Python file object, whose errors carry the system's reason
            except RuntimeError as error:
                # torch's own error is about the archive, which it then could not close
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    else:
        write_tensors(config.destination, state, new=not config.overwrite)
    return net


def _read(source: Path, key: str) -> Preconditioned:
    if source.is_dir() and is_pipeline(source):
        return load_generator(source)
    if source.is_dir():
        generator = source / RUN_GENERATOR
        return load_network(generator if generator.is_dir() else source)
    networks = pickle_reader.load(source)
    if key not in networks:
        raise WeightsError(f"{source} has no network {key!r}; --key can be {' or '.join(networks)}")
    return network_from_pickle(networks[key], where=source)


def describe(net: Preconditioned) -> str:
    """What the network is, and the arguments with which EDM's or GDD's class of that name can load its state_dict."""
    arguments = {
        name: value for name, value in net.init_config().items() if name not in ("sigma_eps", "sigma_init", "dtype")
    }
    parameters = sum(p.numel() for p in net.parameters())
    return (
        f"{type(net).__name__} with {type(net.model).__name__}: {parameters:,} parameters, "
        f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}, "
        f"{f'{net.label_dim} classes' if net.label_dim else 'unconditional'}\n"
        f"arguments: {json.dumps(arguments)}"
    )


@command
def main(args: Sequence[str] | None = None) -> None:
    config = tyro.cli(ConvertConfig, args=args, prog="python -m gdd_fast.convert")
    net = convert(config)
    print(f"{describe(net)}\n{config.source} -> {config.destination}")


if __name__ == "__main__":
    main()
