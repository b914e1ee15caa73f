"""Metrics of the averaged generator during training, and the best generators by these metrics."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gdd_fast.config import TrainConfig, given
from gdd_fast.data import load_data
from gdd_fast.device import full_float32
from gdd_fast.distill.components import load_teacher
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.measure import Measurement, parse_metrics
from gdd_fast.metrics.names import TEACHER, is_better, label
from gdd_fast.metrics.population import Needs, Population, dataset_populations, generator_populations
from gdd_fast.models.files.save import save_network
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ranks import World, world_size
from gdd_fast.sampling.generate import SamplerConfig

BEST = "best"
"""Subfolder of the run: a network folder per metric, and best.json with the best values and when they were reached."""
_TEACHER_SAMPLER = SamplerConfig(sampler="heun", steps=18)
_ONE_STEP = SamplerConfig(sampler="one-step")


def build_measurement(
    config: TrainConfig, generator: Preconditioned, device: torch.device | str = "cpu"
) -> Measurement:
    """What `--evaluate-metrics` asks for, with weights read and references checked against the generator.

    Raises `ConfigError`, `DataError` or `WeightsError` for anything that would stop it from measuring.
    """
    run = config.run
    if run.evaluate_images < world_size():
        raise ConfigError(f"--evaluate-images {run.evaluate_images}: fewer than the {world_size()} processes")
    requests = parse_metrics(run.evaluate_metrics)
    if any(request.metric == "nn" for request in requests):
        raise ConfigError(
            "--evaluate-metrics nn: nearest neighbours are for gdd_fast.evaluate, with a finished network"
        )
    weights = dict(config.feature_weight_paths())
    lite0 = config.backbone_weight_paths().get("tf_efficientnet_lite0")
    if lite0 is not None and any(request.network == "lite0" for request in requests):
        weights.setdefault("lite0", lite0)
    measurement = Measurement(requests, weights=weights, device=device)
    shape = (generator.img_channels, generator.img_resolution, generator.img_resolution)
    known = measurement.references(run.evaluate_ref, shape, complete=True)
    real = load_data(run.evaluate_data or given(config.data.data, "--data"))
    if real.shape != shape:
        raise ConfigError(f"the images to evaluate with are {real.shape}, but the generator makes {shape}")
    measurement.check_counts(run.evaluate_images, [len(real) if kept is None else kept.count or None for kept in known])
    return measurement


class Evaluation:
    """Measures on all ranks together, each with its share of the images; the main rank keeps the best networks.

    The images are those of seeds 0, 1, ..., the same at every tick. They stay on the device, as do the features of the
    real images between ticks.
    """

    def __init__(self, config: TrainConfig, measurement: Measurement, world: World) -> None:
        self.config, self.measurement, self.world = config, measurement, world
        self.tick_images = max(1, round(config.run.tick_kimg * 1e3))
        self._real: list[Population] | None = None

    def is_due(self, images: int) -> bool:
        """Whether the tick at this number of images measures."""
        run = self.config.run
        if images == 0:
            return run.evaluate_at_start
        if not run.evaluate_ticks:
            return False
        return images >= self.config.total_images or images // self.tick_images % run.evaluate_ticks == 0

    @full_float32()
    def __call__(self, net: Preconditioned, images: int) -> dict[str, float]:
        """The values of `net` after `images` images, at 0 also the teacher's, on the main rank. Every rank calls it."""
        values = self._measure(net, _ONE_STEP)
        if images == 0:
            teacher = load_teacher(given(self.config.generator.teacher, "--teacher")).to(self.world.device)
            values |= {TEACHER + key: value for key, value in self._measure(teacher, _TEACHER_SAMPLER).items()}
        elif self.world.is_main:
            self._keep_best(net, images, values)
        return values

    def _measure(self, net: Preconditioned, sampler: SamplerConfig) -> dict[str, float]:
        world, measurement = self.world, self.measurement
        if self._real is None:
            self._real = self._real_images(net)
        seeds = range(self.config.run.evaluate_images)
        found = generator_populations(net, measurement.extractors, seeds, sampler, measurement.needs, world=world)
        return measurement.values(found, self._real) if world.is_main else {}

    def _real_images(self, net: Preconditioned) -> list[Population]:
        run, measurement = self.config.run, self.measurement
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        known = measurement.references(run.evaluate_ref, shape, complete=True)

        def count(extractors: Sequence[FeatureExtractor], needs: Sequence[Needs]) -> list[Population]:
            dataset = load_data(run.evaluate_data or given(self.config.data.data, "--data"))
            return dataset_populations(dataset, extractors, needs, world=self.world)

        return measurement.completed(known, count)

    def _keep_best(self, net: Preconditioned, images: int, values: dict[str, float]) -> None:
        """Write `net` under the name of each metric whose value is the best so far. After a crash it may come from lost
        work."""
        folder = self.config.run_dir / BEST
        best = read_best(self.config.run_dir)
        for key, value in values.items():
            if "_std" in key or not math.isfinite(value):
                continue
            if key not in best or is_better(key, value, best[key]["value"]):
                save_network(net, folder / key)
                best[key] = {"value": value, "images": images, "metric": label(key)}
                with atomic_write(folder / "best.json") as temporary:
                    temporary.write_text(json.dumps(best, indent=2) + "\n")


def read_best(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The best values of a run by metric, each with `value`, `images` and a label, `metric`; empty if not measured."""
    path = run_dir / BEST / "best.json"
    return json.loads(path.read_text()) if path.is_file() else {}
