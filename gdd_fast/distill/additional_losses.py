"""Losses of ablations, added to the GAN's: one against the teacher, and Frechet distances. Most runs have none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gdd_fast.config import TrainConfig
from gdd_fast.device import fast_layout
from gdd_fast.distill.frechet_loss import FrechetLoss
from gdd_fast.distill.teacher_losses import TEACHER_LOSSES, Setup, TeacherLoss
from gdd_fast.distill.teacher_losses.image_distances import Distance, build_distance
from gdd_fast.errors import CheckpointError, ConfigError
from gdd_fast.metrics.features import FeatureExtractor, build_extractor
from gdd_fast.metrics.population import Needs, dataset_populations, generator_populations
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ranks import World
from gdd_fast.sampling.generate import SamplerConfig
from gdd_fast.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from gdd_fast.distill.components import Components

_FILL_BATCH = 64


@dataclass
class AdditionalParts:
    """What the losses need, on the CPU."""

    teacher: Preconditioned | None
    """None without a teacher loss."""
    distance: Distance | None
    extractors: list[FeatureExtractor]
    """Those of the Frechet distances, in the order of the configuration."""

    def networks(self) -> list[nn.Module]:
        """The networks whose operators have to be chosen."""
        networks = [e.network for e in self.extractors if e.network is not None]
        return [*networks, *([self.teacher] if self.teacher is not None else [])]


def additional_parts(config: TrainConfig, teacher: Preconditioned, generator: Preconditioned) -> AdditionalParts | None:
    """What the configuration's additional losses need, with weights read; None if it has no such losses.

    Raises `ConfigError` for a teacher or features that a loss cannot use, `WeightsError` for missing weights.
    """
    options = config.ablation
    if not options.adds_losses:
        return None
    weights = dict(config.feature_weight_paths())
    against: Preconditioned | None = None
    distance: Distance | None = None
    if options.teacher_loss != "none":
        if not isinstance(teacher, EDMPrecond):
            raise ConfigError(
                f"--teacher-loss {options.teacher_loss} is for EDM's networks; a {type(teacher).__name__} can be "
                "distilled with the GAN loss and the Frechet distance"
            )
        against = teacher.eval().requires_grad_(False)
        against.dtype = generator.dtype
        distance = build_distance(options.teacher_loss_distance, weights)
    lite0 = config.backbone_weight_paths().get("tf_efficientnet_lite0")
    if lite0 is not None:
        weights.setdefault("lite0", lite0)
    extractors = [_extractor(name, weights.get(name)) for name in options.frechet_loss]
    for extractor in extractors:
        if extractor.dim is not None and extractor.dim >= options.frechet_population:
            raise ConfigError(
                f"--frechet-population {options.frechet_population}: {extractor.name} has {extractor.dim} features, "
                "and their covariance needs more images than that"
            )
    return AdditionalParts(against, distance, extractors)


def _extractor(name: str, weights: Path | None, device: torch.device | str = "cpu") -> FeatureExtractor:
    if name.startswith("lpips"):
        raise ConfigError(f"--frechet-loss {name}: LPIPS has too many features for a covariance")
    return build_extractor(name, weights=weights, device=device)


class AdditionalLosses:
    """The additional losses of one run on this rank."""

    def __init__(self, config: TrainConfig, parts: Components, net: Preconditioned, world: World) -> None:
        given = parts.additional
        assert given is not None
        self.options, self.world = config.ablation, world
        self._together: dict[str, Any] = {"batch": _FILL_BATCH, "world": world, "everywhere": True}
        self.teacher_loss: TeacherLoss | None = None
        if given.teacher is not None and given.distance is not None:
            layout = fast_layout(world.device, config.generator.g_precision)
            teacher = given.teacher.to(world.device, memory_format=layout)  # type: ignore[call-overload]
            distance = given.distance
            if isinstance(distance, nn.Module):
                distance = distance.to(world.device)
            setup = Setup(self.options, teacher, net, distance)
            self.teacher_loss = TEACHER_LOSSES[self.options.teacher_loss](setup)
        self.averages: dict[nn.Parameter, Tensor] = {p: p.detach().clone() for p in self.parameters()}
        """The optimizer averages everything it trains; these averages are not used."""
        self.frechet = dict(zip(self.options.frechet_loss, self._distances(config, parts, given), strict=True))
        self._seen: dict[str, list[Tensor]] = {}
        self._sums: dict[str, Tensor] = {}

    def _distances(self, config: TrainConfig, parts: Components, given: AdditionalParts) -> list[FrechetLoss]:
        if not given.extractors:
            return []
        weights = dict(config.feature_weight_paths())
        extractors = given.extractors
        if self.world.device.type != "cpu":
            extractors = [_extractor(n, weights.get(n), self.world.device) for n in self.options.frechet_loss]
        found = dataset_populations(parts.dataset, extractors, **self._together)
        losses = []
        for extractor, population in zip(extractors, found, strict=True):
            assert population.statistics is not None
            losses.append(FrechetLoss(extractor, population.statistics, self.options.frechet_population))
        return losses

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train with the generator."""
        return [] if self.teacher_loss is None else [p for p in self.teacher_loss.parameters() if p.requires_grad]

    def begin(self, net: Preconditioned, images: int, number: int) -> None:
        """Call before iteration `number`, which follows `images` images."""
        self._seen, self._sums = {}, {}
        if self.teacher_loss is not None:
            self.teacher_loss.begin(net, images)
        if self.frechet and not all(bool(loss.filled) for loss in self.frechet.values()):
            self._fill(net)
        for loss in self.frechet.values():
            if number % self.options.frechet_refresh == 0 or not loss.distance.any():
                loss.refresh()

    def _fill(self, net: Preconditioned) -> None:
        """Fill the population with the current generator's images of seeds 0, 1, ..., on all ranks together."""
        extractors = [loss.extractors[0] for loss in self.frechet.values()]
        seeds = range(self.options.frechet_population)
        needs = [Needs(statistics=False, rows=True)] * len(extractors)
        one_step = SamplerConfig(sampler="one-step")
        with torch.no_grad():
            found = generator_populations(net, extractors, seeds, one_step, needs, **self._together)
        for loss, population in zip(self.frechet.values(), found, strict=True):
            assert population.rows is not None
            loss.fill(population.rows)

    def __call__(
        self,
        net: Preconditioned,
        fakes: Tensor | None,
        real: Tensor,
        labels: Tensor | None,
        random: torch.Generator,
    ) -> Tensor:
        """Weighted losses (N,) of a micro-batch: `fakes` with gradients, real images in [-1, 1], one-hot labels."""
        total = torch.zeros(len(real), device=self.world.device)
        for name, loss in self.frechet.items():
            assert fakes is not None
            features = loss.features_of(fakes)
            self._seen.setdefault(name, []).append(features.detach())
            total = total + self.options.frechet_weight * loss(features)
        if self.teacher_loss is not None:
            values = self.teacher_loss(net, real, labels, random)
            self._sums["loss_teacher"] = self._sums.get("loss_teacher", 0) + values.detach().sum()
            self._sums["images"] = self._sums.get("images", 0) + torch.tensor(float(len(values)))
            total = total + self.options.teacher_loss_weight * values
        return total

    def end(self, net: Preconditioned) -> dict[str, Tensor]:
        """Call after the generator's step; returns values for the log."""
        values = {f"frechet_{name}": loss.distance.clone() for name, loss in self.frechet.items()}
        for name, loss in self.frechet.items():
            parts = self.world.gather(torch.cat(self._seen[name]))
            loss.add(torch.cat(parts))
        if self.teacher_loss is not None:
            self.teacher_loss.end(net)
            values["loss_teacher"] = self._sums["loss_teacher"] / self._sums["images"]
        return values

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Sections of a checkpoint."""
        sections = {f"frechet_{name}": loss.state_dict() for name, loss in self.frechet.items()}
        return sections if self.teacher_loss is None else {**sections, "teacher_loss": self.teacher_loss.state_dict()}

    def restore(self, saved: Checkpoint, net: Preconditioned) -> None:
        """Load the sections of `state`. Raises `CheckpointError` for a checkpoint of other losses."""
        for name, loss in self.frechet.items():
            saved.load_module(f"frechet_{name}", loss)
        if self.teacher_loss is not None:
            try:
                self.teacher_loss.restore(saved.section("teacher_loss"), net)
            except (RuntimeError, KeyError) as error:
                raise CheckpointError(f"the checkpoint's teacher_loss does not fit: {error}") from None


def build_additional(
    config: TrainConfig, parts: Components, net: Preconditioned, world: World
) -> AdditionalLosses | None:
    """The additional losses of a run whose generator is `net`, on its device; None if the configuration has none."""
    return None if parts.additional is None else AdditionalLosses(config, parts, net, world)
