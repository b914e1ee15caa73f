"""The end of a run: Frechet distances of teacher, untrained and distilled generator, and samples side by side."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdd_fast.acceleration import accelerate_foreign
from gdd_fast.bundled import teacher_path
from gdd_fast.config import TrainConfig, given
from gdd_fast.data import load_data
from gdd_fast.data.fingerprint import dataset_digest
from gdd_fast.device import full_float32
from gdd_fast.distill.components import load_teacher
from gdd_fast.distill.gdd import GRID_SEEDS, Distillation
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write
from gdd_fast.layers.backends import choose_backend, set_backend
from gdd_fast.metrics.features import build_extractor
from gdd_fast.metrics.frechet import frechet_distance
from gdd_fast.metrics.population import dataset_populations, generator_populations
from gdd_fast.models.files.load import as_generator, load_generator
from gdd_fast.ranks import World
from gdd_fast.report import unet_picture
from gdd_fast.report.run_record import COMPARISON, SAMPLES, TEACHER_SHEET, UNET
from gdd_fast.sampling.generate import SamplerConfig, generate
from gdd_fast.sampling.grid import save_grid, save_panel
from gdd_fast.training.output import reading_bar
from gdd_fast.training.two_threads import at_once

REPORT = "report.json"
PANEL_IMAGES = 36
FEATURES = ("lite0", "pixels")
TEACHER_FIGURES = "figures.json"  # beside the bundled teacher: its own many-step distances, which take long to compute
HEUN = SamplerConfig(sampler="heun", steps=18)
ONE_STEP = SamplerConfig(sampler="one-step")


def check(config: TrainConfig, generator: nn.Module) -> None:
    """Raise a `GddFastError` now for anything that would stop `write` from measuring at the end of the run."""
    reference = load_data(_evaluate_data(config))
    ours, theirs = (generator.img_channels, generator.img_resolution), (reference.channels, reference.resolution)
    if ours != theirs:
        raise ConfigError(
            f"--evaluate-data holds {theirs[0]} x {theirs[1]}^2 images but the generator makes {ours[0]} x "
            f"{ours[1]}^2; their size and channels must agree (python -m gdd_fast.prepare resizes)"
        )
    if len(reference) < 2:
        raise ConfigError("--evaluate-data holds only one image; a covariance needs at least 2")
    for name in FEATURES:
        build_extractor(name, **_options(config, name))


def read_every_image(config: TrainConfig, world: World) -> None:
    """Raise `DataError` for a damaged image in `--evaluate-data` now, not when the run measures. Each rank reads its
    share. Skipped if these are the training data, which training reads anyway.
    """
    asked = config.run.evaluate_data
    if not config.run.evaluate_images or asked is None or asked == config.data.data:
        return
    dataset = load_data(asked)
    with reading_bar(world.is_main) as progress:
        dataset.validate(range(world.rank, len(dataset), world.size), progress)


def begin(config: TrainConfig, task: Distillation) -> None:
    """Before the first iteration, write what the report compares with, over the leftovers of a run that was never
    saved. Every rank calls it.

    samples/teacher.png and samples/000000000.png show the teacher's images and one-step images of the untrained
    generator, from the noise of all later sheets; unet.json says which weights train.
    """
    task.save_sheet(0)
    if not task.world.is_main:
        return
    teacher = load_teacher(given(config.generator.teacher, "--teacher")).to(task.world.device)
    set_backend(teacher, config.run.backend)
    images = [part.images for part in generate(teacher, GRID_SEEDS, HEUN, batch=task.micro_batch)]
    save_grid(torch.cat(images), config.run_dir / SAMPLES / TEACHER_SHEET)
    with atomic_write(config.run_dir / UNET) as temporary:
        temporary.write_text(json.dumps(unet_picture.record(task.generator)) + "\n")


def read(config: TrainConfig, contents: dict[str, str], trained_images: int) -> dict[str, dict[str, float]] | None:
    """The distances that `write` left in the run folder; None if they were measured differently, or `write` was
    killed."""
    path = config.run_dir / REPORT
    if not path.is_file() or not (config.run_dir / COMPARISON).is_file():
        return None
    try:
        report = json.loads(path.read_bytes())
    except ValueError:  # not from `write`, which leaves a whole file or none
        return None
    if not isinstance(report, dict):
        return None
    return report["distances"] if report.get("measured") == _measured(config, contents, trained_images) else None


@full_float32()
def write(
    config: TrainConfig, contents: dict[str, str], device: torch.device, trained_images: int
) -> dict[str, dict[str, float]]:
    """Measure, and write report.json and comparison.png to the run folder; `contents` as in `components.Components`.

    Distances are between `evaluate_images` generated images (seeds 0, 1, ...) and `--evaluate-data`. float32 means full
    fp32, whatever the run's own arithmetic was. Returns distances by row and feature.
    """
    images = config.run.evaluate_images
    extractors = [build_extractor(name, device=device, **_options(config, name)) for name in FEATURES]
    reference_set = load_data(_evaluate_data(config))
    teacher = load_teacher(given(config.generator.teacher, "--teacher")).to(device)
    untrained = as_generator(teacher, config.generator.sigma_init).eval().requires_grad_(False)
    distilled = load_generator(config.run_dir, device)
    networks = [net for net in (teacher, untrained, distilled, *(e.network for e in extractors)) if net is not None]
    choose_backend(config.run.backend, device.type, networks)
    for net in (teacher, untrained, distilled):
        accelerate_foreign(net, config.run.backend)
    stored = _stored_figures(config, images, [e.name for e in extractors], len(reference_set))
    work = len(reference_set) + images * (2 if stored else 3)
    from tqdm import tqdm

    with tqdm(total=work, unit="img", desc="Frechet distance", dynamic_ncols=True) as bar:
        subjects = {"untrained": (untrained, ONE_STEP), "distilled": (distilled, ONE_STEP)}
        if not stored:
            subjects = {"teacher": (teacher, HEUN), **subjects}

        def generated() -> dict[str, list[Any]]:
            options = {"seeds": range(images), "progress": bar.update}
            return {
                row: generator_populations(net, extractors, sampler=sampler, **options)
                for row, (net, sampler) in subjects.items()
            }

        real = partial(dataset_populations, reference_set, extractors, progress=bar.update)
        reference: list[Any]
        reference, found = at_once(real, generated, device)
    rows = {"teacher": stored} if stored else {}
    for row, populations in found.items():
        of = zip(extractors, populations, reference, strict=True)
        rows[row] = {e.name: round(frechet_distance(own.statistics, ref.statistics), 4) for e, own, ref in of}
    report = {
        "images": images,
        "reference": reference_set.name,
        "reference_images": len(reference_set),
        "distances": rows,
        "teacher_is_stored": bool(stored),
        "measured": _measured(config, contents, trained_images),
    }
    panel = [
        (f"Teacher, {HEUN.steps} steps", _samples(teacher, HEUN)),
        ("Teacher's weights in one step, untrained", _samples(untrained, ONE_STEP)),
        ("Distilled, one step", _samples(distilled, ONE_STEP)),
    ]
    save_panel(panel, config.run_dir / COMPARISON, cols=12)
    # last, as its presence says that the rest is complete
    with atomic_write(config.run_dir / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return rows


def table(run_dir: Path) -> str:
    """The distances in a run folder's report.json as text."""
    report = json.loads((run_dir / REPORT).read_text())
    rows = report["distances"]
    features = list(rows["distilled"])
    titles = {
        "teacher": f"teacher, {HEUN.steps} steps" + (" (stored with it)" if report["teacher_is_stored"] else ""),
        "untrained": "teacher's weights, 1 step",
        "distilled": "distilled, 1 step",
    }
    lines = [
        f"Frechet distance of {report['images']:,} images to {report['reference_images']:,} images of "
        f"{report['reference']}, lower is better"
    ]
    lines.append(f"  {'':36}" + "".join(f"{feature:>12}" for feature in features))
    for row, values in rows.items():
        lines.append(f"  {titles[row]:36}" + "".join(f"{values[feature]:12.2f}" for feature in features))
    return "\n".join(lines)


def _evaluate_data(config: TrainConfig) -> str:
    return config.run.evaluate_data or given(config.data.data, "--data")


def _measured(config: TrainConfig, contents: dict[str, str], trained_images: int) -> dict[str, Any]:
    """The inputs for which a report is valid."""
    return {
        "trained_images": trained_images,
        "evaluate_images": config.run.evaluate_images,
        "evaluate_data": dataset_digest(load_data(_evaluate_data(config))),
        "teacher": contents["teacher"],
    }


def _options(config: TrainConfig, name: str) -> dict[str, Any]:
    weights = config.backbone_weight_paths().get("tf_efficientnet_lite0")
    return {"weights": weights} if name == "lite0" and weights else {}


def _samples(net: nn.Module, sampler: SamplerConfig) -> torch.Tensor:
    return torch.cat([batch.images for batch in generate(net, range(PANEL_IMAGES), sampler)])


def _stored_figures(
    config: TrainConfig, images: int, features: Sequence[str], reference_images: int
) -> dict[str, float] | None:
    """The figures stored beside the teacher, if they were measured exactly as this report's would be."""
    path = teacher_path(given(config.generator.teacher, "--teacher")) / TEACHER_FIGURES
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    asked = {"images": images, "reference": config.run.evaluate_data, "reference_images": reference_images}
    if any(stored.get(key) != value for key, value in asked.items()):
        return None
    return {name: stored["distances"][name] for name in features}
