"""What `--dry-run` prints: the configuration, what would train, which implementations run, what is still needed."""

import json
from typing import Any

import torch

from gdd_fast.backend import summary
from gdd_fast.config import AUTO, DiscriminatorConfig, TrainConfig, override, to_dict
from gdd_fast.distill import first_stage
from gdd_fast.distill.components import Components, dtype_of
from gdd_fast.distill.freeze import FreezeReport, freeze
from gdd_fast.distill.memory_forecast import Forecast, forecast, of_components
from gdd_fast.models.backbones import build_backbone, fold_batch_norm
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.edm import published
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ranks import world_size
from gdd_fast.training.batches import split_batch


def describe_recipe(config: TrainConfig) -> str:
    """What is known without data or teacher: the configuration, the parameters of the paper's networks for this preset,
    which are frozen, and what is still needed. Reads no file."""
    lines = [json.dumps(to_dict(config), indent=2), ""]
    arguments = published(config.preset)
    if arguments is not None:
        net, features, r1_features, heads = _networks_of(config, arguments)
        size = f"3 x {net.img_resolution}^2, {net.label_dim} classes"
        lines.append(f"Teacher of this preset: {type(net.model).__name__}, {size}")
        lines += _networks(freeze(net, config.generator.freeze), features, heads)
        found = forecast(config, net, features, r1_features, heads)
        lines += ["", _memory(config, found), "This leaves out the data set and assumes a trained class table."]
    return "\n".join([*lines, "", "Still needed:", *(f"  {message}" for message in config.missing())])


def forecast_recipe(config: TrainConfig) -> Forecast | None:
    """The memory of a preset of the paper, without data set, teacher or weights; some seconds. None for others."""
    arguments = published(config.preset)
    if arguments is None:
        return None
    net, features, r1_features, heads = _networks_of(config, arguments)
    freeze(net, config.generator.freeze)
    return forecast(config, net, features, r1_features, heads)


def _networks_of(
    config: TrainConfig, arguments: dict[str, Any]
) -> tuple[GDDPrecond, ProjectedFeatures, ProjectedFeatures, DiscriminatorHeads]:
    """A generator with these arguments, the backbones, those of the R1 step, and the heads, on the meta device."""
    options = config.discriminator
    with torch.device("meta"):
        net = GDDPrecond(**arguments if config.data.cond else {**arguments, "label_dim": 0})
        net.dtype = dtype_of(config.generator.g_precision)
        types = [dtype_of(p) for p in (options.d_precision, config.loss.r1_precision)]
        features, r1_features = (_features(options, dtype) for dtype in types)
        r1_features = features if types[0] == types[1] else r1_features
        sizes = (features.channels, features.resolutions, net.label_dim)
        heads = DiscriminatorHeads(*sizes, width=options.head_width, dtype=types[0])
    return net, features, r1_features, heads


def _features(options: DiscriminatorConfig, dtype: torch.dtype) -> ProjectedFeatures:
    backbones = [build_backbone(name, None, options.disc_resolution) for name in options.backbones]
    return ProjectedFeatures([fold_batch_norm(b) for b in backbones], options.disc_resolution, dtype=dtype)


def _memory(config: TrainConfig, found: Forecast) -> str:
    """The forecast's table for a run with the current number of processes."""
    local_batch, _ = split_batch(config.run.batch, None, world_size())
    asked = config.run.batch_gpu
    images = local_batch if asked in (None, AUTO) else min(int(asked), local_batch)
    return found.table(local_batch, images, captured=config.has_fixed_steps)


def _networks(frozen: FreezeReport, features: torch.nn.Module, heads: torch.nn.Module) -> list[str]:
    """The tables of parameters."""
    backbones = sum(p.numel() for p in features.parameters())
    trained = sum(p.numel() for p in heads.parameters() if p.requires_grad)
    return [
        str(frozen),
        f"Discriminator: {backbones / 1e6:.2f} M frozen in backbones and projections, "
        f"{trained / 1e6:.2f} M trained in heads",
    ]


def describe(config: TrainConfig, parts: Components) -> str:
    """The configuration as JSON and the table of parameters."""
    dataset, generator = parts.dataset, parts.generator
    return "\n".join(
        [
            json.dumps(to_dict(override(config, run_dir=config.run_dir)), indent=2),
            "",
            f"Data: {dataset.name}, {len(dataset):,} images, {dataset.channels} x {dataset.resolution}^2, "
            f"{dataset.label_dim} classes",
            f"Generator: {generator.img_channels} x {generator.img_resolution}^2, {generator.label_dim} classes",
            *([f"First: {stage}"] if (stage := first_stage.description(config, generator)) else []),
            f"Operators: {summary(parts.operators)}",
            *_networks(parts.frozen, parts.features, parts.heads),
            "",
            _memory(config, of_components(config, parts)),
        ]
    )
