"""Measure how far images are from real ones: `python -m gdd_fast.evaluate --net PATH --data real.zip --images 5000`.

    python -m gdd_fast.evaluate --net G --ref cifar10-32x32.npz --metrics fid --images 50000 --rounds 3
    python -m gdd_fast.evaluate --net G --data real.zip --metrics fid,kid,pr,dc,is,fd@lite2
    python -m gdd_fast.evaluate --net G --data real.zip --held-out test.zip --metrics nn@lite2
    python -m gdd_fast.evaluate ref --data real.zip --features inception --out real.npz

Metrics: fid, fd (Frechet distance with other networks), kid, is, pr (precision and recall), dc (density and coverage),
nn (nearest training images). docs/metrics.md says which values are comparable.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from gdd_fast.cli import command, parse, start

with start(__name__):
    import numpy as np
    import torch
    import tyro
    from torch import Tensor

    from gdd_fast.acceleration import accelerate_foreign
    from gdd_fast.backend import Backend
    from gdd_fast.config import named_paths
    from gdd_fast.data import ImageDataset, load_data, open_dataset
    from gdd_fast.data.dataset import choose_images
    from gdd_fast.device import full_float32
    from gdd_fast.errors import ConfigError, require
    from gdd_fast.files import check_destination
    from gdd_fast.interop.hub import network_path
    from gdd_fast.layers.backends import choose_backend
    from gdd_fast.metrics.features import FeatureExtractor
    from gdd_fast.metrics.make_reference import ReferenceConfig, image_bar, write_reference
    from gdd_fast.metrics.measure import Measurement, key_of, parse_metrics
    from gdd_fast.metrics.memorisation import Memorisation
    from gdd_fast.metrics.names import deviation_key, label
    from gdd_fast.metrics.population import Needs, Population, dataset_populations, generator_populations
    from gdd_fast.metrics.shared_judges import backbones_of, shared_judges
    from gdd_fast.models.files.load import load_generator
    from gdd_fast.ranks import ALONE, World, is_main, join
    from gdd_fast.sampling.generate import SamplerConfig, generate
    from gdd_fast.sampling.seeds import check_class, parse_seeds
    from gdd_fast.settings import Settings


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What `evaluate` measures."""

    net: str | None = None
    """The generator: EDM .pkl, network folder, training run folder (its EMA generator), diffusers pipeline, or the name
    of a Hub repository that holds one; `demo` is the bundled teacher."""
    samples: Path | None = None
    """Existing images to measure instead of --net: a zip, folder or npz as gdd_fast.sample writes it."""
    data: str | None = None
    """The real images: EDM-style zip, folder or npz; `demo-test` is the held-out part of the bundled set."""
    ref: tuple[Path, ...] = ()
    """Statistics of the real images, instead of --data or in addition to it: a file from `evaluate ref`, EDM, EDM2,
    clean-fid or torch-fidelity."""
    metrics: str = "fd"
    """Comma-separated: fid, fd, kid, is, pr, dc, nn; `metric@network` names another network, such as kid@lite2."""
    features: str | None = None
    """Networks for the metrics that do not name one, comma-separated: inception, lite0, lite2, vgg16, resnet56, dinov2,
    clip, lpips, lpips-vgg, pixels, timm:NAME. By default lite0,pixels for fd and inception for the others."""
    feature_resolution: int | None = None
    """Resolution at which features are computed; by default each network's own, such as 64 for lite0 and 16 for
    pixels."""
    feature_weights: tuple[str, ...] = ()
    """Local weight files of feature networks, each `name=path`."""
    images: int = 5000
    """How many images to generate, from seed 0 on; of --samples, how many to use at most. Published FIDs use 50000."""
    rounds: int = 1
    """How many times to measure, each time with the next seeds; EDM reports the lowest of three."""
    data_images: int | None = None
    """How many images of --data to use at most; by default all."""
    held_out: str | None = None
    """For nn: real images that were not trained on, to tell how near unseen images are."""
    nn_sheet: Path = Path("neighbours.png")
    """For nn: the .png that shows samples beside their nearest training images."""
    seeds: str | None = None
    """Generate these seeds instead, such as 0-49999."""
    class_index: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Generate only this class; otherwise each seed draws its own."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch: int = 64
    """Images per pass through the networks."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best available, `torch` their definitions.
    With any other, operators that lack it run their definition."""
    generator_device: Literal["cpu", "cuda"] = "cpu"
    """Where random numbers are drawn. `cpu` gives the same latents on every machine, `cuda` those of EDM's code."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute dtype of the generator; by default the one it was saved with."""
    json: bool = False
    """Print one JSON object instead of lines."""

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.images)) if self.seeds is None else parse_seeds(self.seeds)

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work. Reads no file."""
        requests = parse_metrics(self.metrics, self.features)
        names = [request.metric for request in requests]
        require(self.data is not None or self.ref, "pass the real images, --data PATH, or their statistics, --ref PATH")
        require(self.net is None or self.samples is None, "--net and --samples: choose one")
        require(not (self.net is None and self.samples is None), "nothing to evaluate: pass --net or --samples")
        self._refuse_unused(names)
        require(names.count("nn") <= 1, "--metrics nn takes only one network")
        if "nn" in names:
            require(self.data is not None, "--metrics nn looks for the nearest images in --data, which is not given")
            require(self.nn_sheet.suffix.lower() == ".png", f"--nn-sheet must be a .png file, not {self.nn_sheet}")
            check_destination(self.nn_sheet)
        require(self.images >= 2, f"--images must be at least 2, not {self.images}")
        require(self.rounds >= 1, f"--rounds must be at least 1, not {self.rounds}")
        require(self.data_images is None or self.data_images >= 2, "--data-images must be at least 2")
        require(len(self.seed_list) >= 2, f"--seeds {self.seeds}: a covariance needs at least 2 images")
        require(self.batch >= 1, f"--batch must be at least 1, not {self.batch}")
        require(
            self.generator_device == "cpu" or torch.cuda.is_available(),
            "--generator-device cuda: there is no usable CUDA device; use cpu",
        )
        self.sampler.validate()
        named_paths("--feature-weights", self.feature_weights)

    def _refuse_unused(self, metrics: list[str]) -> None:
        """Raise `ConfigError` for an option that would have no effect."""
        generator = {
            "--seeds": self.seeds is not None,
            "--class": self.class_index is not None,
            "--dtype": self.dtype is not None,
            "--rounds": self.rounds != 1,
            "--generator-device": self.generator_device != EvaluateConfig.generator_device,
            "--sampler and its options": self.sampler != SamplerConfig(),
        }
        for name, given in generator.items():
            require(self.net is not None or not given, f"{name} is for a generator (--net), which is not given")
        require(self.data is not None or self.data_images is None, "--data-images limits --data, which is not given")
        require(self.seeds is None or self.images == EvaluateConfig.images, "--seeds and --images: choose one")
        require(self.held_out is None or "nn" in metrics, "--held-out is for --metrics nn")


@full_float32()
def evaluate(config: EvaluateConfig, show: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
    """The metrics of `config`, as plain JSON types; writes the sheet of `nn`.

    The result has `metrics`, the values by key; after several rounds these are means, and `rounds` (each round's
    values), `std` (their standard deviation) and `min` are there too. Under torchrun every process takes its share of
    the batches; the values are bitwise those of a single process. The first process returns them, the others an empty
    result. `show` is called with the result before the sheet is written, since a full disk may refuse that. Raises a
    `GddFastError`, before anything is computed, if an option, a file or the weights cannot work.
    """
    config.validate()
    with join(config.device) as world:
        result, save_sheet = _evaluate(config, world)
        if world.is_main:
            show(result)
            save_sheet()
        return result


def _evaluate(config: EvaluateConfig, world: World) -> tuple[dict[str, Any], Callable[[], None]]:
    """The result, and a function that writes the sheet of `nn`."""
    device = world.device
    measurement = Measurement(
        parse_metrics(config.metrics, config.features),
        weights=named_paths("--feature-weights", config.feature_weights),
        resolution=config.feature_resolution,
        device=device,
    )
    dataset = None if config.data is None else load_data(config.data)
    samples = None if config.samples is None else open_dataset(config.samples)
    held_out = None if config.held_out is None else load_data(config.held_out)
    net = None
    if config.net is not None:
        net = load_generator(network_path(config.net), device, config.dtype)
        check_class(config.class_index, net.label_dim)
    shape = (net.img_channels, net.img_resolution, net.img_resolution) if samples is None else samples.shape
    for real in filter(None, (dataset, held_out)):
        check_same_form(shape, real.shape, str(config.data if real is dataset else config.held_out))
    known = measurement.references(config.ref, shape, complete=dataset is not None)
    _check_counts(config, measurement, samples, dataset, held_out, known)
    for images, most in ((samples, config.images), (held_out, None)):
        if images is not None:  # a damaged one is found now, not after all the others were measured
            share = world.share(choose_images(len(images), most).tolist(), config.batch)
            with image_bar(len(share), "checked", world, delay=2) as bar:
                images.validate(share, lambda done, _, bar=bar: bar.update(done - bar.n))
    choose_backend(config.backend, device.type, [n for n in (net, *measurement.networks) if n is not None])
    if net is not None:
        accelerate_foreign(net, config.backend)
        for line in shared_judges(backbones_of(Path(config.net)), measurement.extractors):
            print(line, file=sys.stderr)

    def of_dataset(
        images: ImageDataset,
        what: str,
        max_images: int | None,
        extractors: Sequence[FeatureExtractor] = measurement.extractors,
        needs: Sequence[Needs] = measurement.needs,
        world: World = world,
    ) -> list[Population]:
        with image_bar(min(len(images), max_images or len(images)), what, world) as bar:
            options = {"batch": config.batch, "max_images": max_images, "progress": bar.update, "world": world}
            return dataset_populations(images, extractors, needs, **options)

    for request in measurement.requests:
        if request.metric == "nn":  # its sheet shows images by their index in the data, which a reference does not have
            known[measurement.extractors.index(measurement.extractor(request.network))] = None
    real = measurement.completed(known, lambda *networks: of_dataset(dataset, "real", config.data_images, *networks))

    options = {
        "batch": config.batch,
        "class_index": config.class_index,
        "generator_device": config.generator_device,
    }
    rounds, save_sheet = [], lambda: None
    for number in range(config.rounds):
        span = max(config.seed_list) - min(config.seed_list) + 1
        seeds = [seed + number * span for seed in config.seed_list]
        if samples is not None:
            generated = of_dataset(samples, "generated", config.images)
        else:
            with image_bar(len(seeds), "generated" if config.rounds == 1 else f"round {number + 1}", world) as bar:
                generated = generator_populations(
                    net,
                    measurement.extractors,
                    seeds,
                    config.sampler,
                    measurement.needs,
                    progress=bar.update,
                    world=world,
                    **options,
                )
        if not world.is_main:
            continue
        rounds.append(measurement.values(generated, real))
        if number == 0:
            ours = _of(samples, config.images) if net is None else _of_seeds(net, seeds, config.sampler, options)
            found = _neighbours(config, measurement, generated, real, held_out, of_dataset)
            if found is not None:
                rounds[0] |= found[0]
                training = _of(dataset, config.data_images)
                save_sheet = partial(found[1].save_sheet, config.nn_sheet, ours, training)
    if not world.is_main:
        return {}, save_sheet
    result = {
        "metrics": {key: float(np.mean([values[key] for values in rounds if key in values])) for key in rounds[0]},
        "generated_images": generated[0].count,
        "real_images": real[0].count or None,
    }
    if config.rounds > 1:
        keys = rounds[-1]
        result["rounds"] = rounds
        result["std"] = {key: float(np.std([values[key] for values in rounds])) for key in keys}
        result["min"] = {key: min(values[key] for values in rounds) for key in keys}
    return result, save_sheet


def _check_counts(
    config: EvaluateConfig,
    measurement: Measurement,
    samples: ImageDataset | None,
    dataset: ImageDataset | None,
    held_out: ImageDataset | None,
    known: list[Population | None],
) -> None:
    """Raise `ConfigError`, before images are made, if there are too few for a metric."""
    if held_out is not None and len(held_out) < 2:
        raise ConfigError(f"--held-out {config.held_out} holds {len(held_out)} image; it needs at least 2")
    there = None if dataset is None else min(len(dataset), config.data_images or len(dataset))
    generated = len(config.seed_list) if samples is None else min(len(samples), config.images)
    real = [there if kept is None else kept.count or None for kept in known]
    measurement.check_counts(generated, real)


def _neighbours(
    config: EvaluateConfig,
    measurement: Measurement,
    generated: list[Population],
    real: list[Population],
    held_out: ImageDataset | None,
    of_dataset,
) -> tuple[dict[str, float], Memorisation] | None:
    """The values of `nn` and what they were computed from; None if it was not asked for."""
    network = next((request.network for request in measurement.requests if request.metric == "nn"), None)
    if network is None:
        return None
    unseen = None
    if held_out is not None:
        alone = {"extractors": [measurement.extractor(network)], "needs": [Needs(statistics=False, rows=True)]}
        unseen = of_dataset(held_out, "held out", None, **alone, world=ALONE)[0].rows
    found = Memorisation.of(measurement.of(network, generated).rows, measurement.of(network, real).rows, unseen)
    return {key_of(name, measurement.extractor(network)): value for name, value in found.values().items()}, found


def _of(dataset: ImageDataset, max_images: int | None):
    """A function from indices among the measured images to those images."""
    chosen = choose_images(len(dataset), max_images)
    return lambda places: torch.from_numpy(dataset.images([int(chosen[place]) for place in places]))


def _of_seeds(net: torch.nn.Module, seeds: list[int], sampler: SamplerConfig, options: dict[str, Any]):
    """The same for generated images, which are made again from their seeds."""

    def images(places: Sequence[int]) -> Tensor:
        batches = generate(net, [seeds[place] for place in places], sampler, **options)
        return torch.cat([batch.images.cpu() for batch in batches]).permute(0, 3, 1, 2)

    return images


def report(result: dict[str, Any]) -> str:
    """What `evaluate` found, as lines to read."""
    against = "given statistics" if result["real_images"] is None else f"{result['real_images']} real ones"
    rounds = f", {len(result['rounds'])} rounds: mean, deviation, lowest" if "rounds" in result else ""
    lines = [f"{result['generated_images']} images against {against}{rounds}"]
    width = max(24, *(len(key) + 2 for key in result["metrics"]))
    for key, value in result["metrics"].items():
        if "_std" in key:
            continue
        deviation = result["metrics"].get(deviation_key(key))
        line = f"  {label(key):<{width}}{value:>12.4f}"
        if "rounds" in result and key in result["std"]:
            line += f" +- {result['std'][key]:<10.4f}{result['min'][key]:>12.4f}"
        elif deviation is not None:
            line += f" +- {deviation:.4f}"
        lines.append(line)
    return "\n".join(lines)


def check_same_form(ours: tuple[int, ...], real: tuple[int, ...], where: str) -> None:
    """Raise `ConfigError` if sizes differ. Feature networks would resize both, but the distance would mean nothing."""
    if ours != real:
        raise ConfigError(
            f"the generated images are {ours[0]} x {ours[1]}^2, those of {where} are {real[0]} x {real[1]}^2; "
            "compare images of the same size and channels (python -m gdd_fast.prepare resizes)"
        )


@command
def main(args: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["ref"]:
        config = parse(ReferenceConfig, name="evaluate ref", args=args[1:], description=__doc__)
        count = write_reference(config)
        if is_main():
            print(f"statistics of {count} real images -> {config.out}")
        return
    config = parse(EvaluateConfig, name="evaluate", args=args, description=__doc__)
    evaluate(config, show=lambda result: print(json.dumps(result) if config.json else report(result), flush=True))


if __name__ == "__main__":
    main()
