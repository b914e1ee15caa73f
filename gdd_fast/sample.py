"""Generate images with a one-step generator, or with a diffusion teacher in many steps.

`python -m gdd_fast.sample --net PATH --seeds 0-63 --grid grid.png --out images.zip`

Under torchrun (`torchrun --standalone --nproc_per_node=8 -m gdd_fast.sample ...`) every process makes its share of the
batches and the first one writes them: the files are those of a single process.

Ctrl-C and SIGTERM keep every finished image; a second signal stops at once. The same command then continues where the
run stopped. The exit status is 130 after Ctrl-C, 143 after SIGTERM, 2 for bad input.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from gdd_fast.cli import command, parse, start

with start(__name__):
    import torch
    import tyro
    from tqdm import tqdm

    from gdd_fast.acceleration import accelerate_foreign
    from gdd_fast.backend import Backend
    from gdd_fast.device import full_float32
    from gdd_fast.engine.engines import Engine, choose_engine
    from gdd_fast.engine.one_step import OneStepGenerator
    from gdd_fast.errors import ConfigError
    from gdd_fast.files import check_destination, check_writable
    from gdd_fast.interop.hub import network_path
    from gdd_fast.layers.backends import choose_backend
    from gdd_fast.layers.convolution import hold_frozen_weights
    from gdd_fast.models.files.load import load_generator, network_digest
    from gdd_fast.ranks import World, join
    from gdd_fast.sampling.generate import Batch, SamplerConfig, launch, to_host
    from gdd_fast.sampling.grid import save_grid
    from gdd_fast.sampling.resume import Reserved, part_folder, reserve
    from gdd_fast.sampling.seeds import check_class, parse_seeds
    from gdd_fast.sampling.writers import check_new_output
    from gdd_fast.settings import Settings

_GRID_IMAGES = 400  # nobody looks at a larger sheet, and a run of 50,000 must not hold its images in memory


@dataclass(frozen=True)
class SampleConfig(Settings):
    """What `sample` makes."""

    net: str
    """EDM .pkl, network folder, training run folder (its EMA generator), diffusers pipeline, or the name of a Hub
    repository that holds one; `demo` is the bundled teacher."""
    out: Path | None = None
    """Where the images go: a .zip, an .npz (arr_0 uint8 NHWC, arr_1 classes), or a new folder of PNGs."""
    grid: Path | None = None
    """A PNG that shows the first 400 images side by side."""
    seeds: str = "0-63"
    """Numbers and ranges, such as 0-63,100. The image of a seed does not depend on the other seeds."""
    class_index: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Make only this class; otherwise each seed draws its own."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch: int = 64
    """Images per pass through the network."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best available, `torch` their definitions.
    With any other, operators that lack it run their definition."""
    generator_device: Literal["cpu", "cuda"] = "cpu"
    """Where random numbers are drawn. `cpu` gives the same latents on every machine, `cuda` those of EDM's code."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute dtype of the network; by default the one it was saved with."""
    engine: Engine = "auto"
    """How one-step sampling runs: `eager`, `compile`, `graph` (CUDA graphs); `auto` is `graph` on a GPU."""
    subdirs: bool = False
    """In an output folder, put every thousand seeds in a subfolder. A zip always has subfolders."""

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work, before the network is read."""
        if self.out is None and self.grid is None:
            raise ConfigError("nowhere to put the images: pass --out PATH, --grid PATH, or both")
        if self.out is not None and not part_folder(self.out).exists():
            check_new_output(self.out)
        if self.out is not None:
            check_writable(self.out.absolute().parent)
        if self.engine != "auto" and self.sampler.sampler != "one-step":
            raise ConfigError(f"--engine {self.engine} is for the one-step sampler, not {self.sampler.sampler}")
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise ConfigError(f"--grid must be a .png file, not {self.grid}")
        if self.grid is not None:
            check_destination(self.grid)
        if self.batch < 1:
            raise ConfigError(f"--batch must be at least 1, not {self.batch}")
        if self.generator_device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--generator-device cuda: there is no usable CUDA device; use cpu")
        self.sampler.validate()
        parse_seeds(self.seeds)


@full_float32()
def sample(config: SampleConfig) -> None:
    """Write the images that `config` asks for. Raises a `GddFastError` before the first image if it cannot work."""
    config.validate()
    seeds = parse_seeds(config.seeds)
    with join(config.device) as world:
        engine = choose_engine(config.engine, world.device)
        # before reading the network, which may take minutes
        reserved = reserve(config.out) if config.out is not None and world.is_main else nullcontext()
        with reserved as output:
            _sample(config, seeds, world, engine, output)


def _sample(config: SampleConfig, seeds: Sequence[int], world: World, engine: Engine, output: Reserved | None) -> None:
    device = world.device
    net = load_generator(network_path(config.net), dtype=config.dtype)
    choose_backend(config.backend, device.type, [net])
    check_class(config.class_index, net.label_dim)
    if net.img_channels not in (1, 3):
        raise ConfigError(
            f"{config.net} makes maps of {net.img_channels} channels, but image files have 1 or 3: call "
            'OneStepGenerator.from_pretrained(...)(n, output="float") for the values'
        )
    run = _run(config, seeds, net)
    if output is not None:
        output.check(run)
    if config.sampler.sampler == "one-step":
        sigma = config.sampler.sigma_max
        net = OneStepGenerator.from_network(net, device=device, engine=engine, backend=config.backend, sigma=sigma)
    else:
        net = hold_frozen_weights(net.to(device), net.dtype)
        accelerate_foreign(net, config.backend)

    def images_of(seeds: Sequence[int]) -> Iterator[Batch]:
        batches = launch(
            net,
            seeds,
            config.sampler,
            batch=config.batch,
            class_index=config.class_index,
            generator_device=config.generator_device,
        )
        return to_host(batches)

    shown: list[torch.Tensor] = []
    started = time.monotonic()
    with (
        nullcontext() if output is None else output.writer(seeds, run, subdirs=config.subdirs) as writer,
        tqdm(total=len(seeds), unit="img", dynamic_ncols=True, disable=not world.is_main) as bar,
    ):
        done = world.largest(0 if writer is None else writer.done)
        if done:
            bar.write(f"{config.out}: resuming after {done} images")
            bar.update(done)
        left = seeds[done:]
        for part in world.in_order(images_of(world.share(left, config.batch))):
            if writer is not None:
                writer.put(part.seeds, part.images, part.classes)
            if config.grid is not None and bar.n < _GRID_IMAGES:
                shown.append(part.images[: _GRID_IMAGES - bar.n])
            bar.update(len(part.seeds))
        seconds = time.monotonic() - started
        if config.grid is not None and world.is_main:
            # Before the images appear under their final name: after that, nothing would be remade. Here, those that an
            # earlier run wrote are made again for the grid.
            again = images_of(seeds[: min(done, _GRID_IMAGES)])
            save_grid(torch.cat([part.images for part in again] + shown), config.grid)
    if world.is_main:
        written = " and ".join(str(path) for path in (config.out, config.grid) if path is not None)
        made = len(seeds) - done
        print(f"{made} images in {seconds:.1f} s ({made / seconds:.1f} images/s, {device}) -> {written}")


def _run(config: SampleConfig, seeds: Sequence[int], net: torch.nn.Module) -> dict[str, Any]:
    """What the images depend on: an interrupted run is resumed only if all of this is the same."""
    return {
        "network": network_digest(net),
        "dtype": str(net.dtype),
        "seeds": hashlib.sha256(repr(list(seeds)).encode()).hexdigest(),
        "class": config.class_index,
        "sampler": {name: str(value) for name, value in asdict(config.sampler).items()},
        "generator_device": config.generator_device,
        "subdirs": config.subdirs,
    }


@command
def main(args: Sequence[str] | None = None) -> None:
    sample(parse(SampleConfig, name="sample", args=args, description=__doc__))


if __name__ == "__main__":
    main()
