"""What `--dry-run` prints: the resolved configuration, what trains, and which implementations run."""

import json

from gdd_fast.backend import summary
from gdd_fast.config import TrainConfig, override, to_dict
from gdd_fast.distill.components import Components


def describe(config: TrainConfig, parts: Components) -> str:
    """The configuration as JSON and the table of parameters."""
    dataset, generator = parts.dataset, parts.generator
    backbones = sum(p.numel() for p in parts.features.parameters())
    heads = sum(p.numel() for p in parts.heads.parameters() if p.requires_grad)
    return "\n".join(
        [
            json.dumps(to_dict(override(config, run_dir=config.run_dir)), indent=2),
            "",
            f"Data: {dataset.name}, {len(dataset):,} images, {dataset.channels} x {dataset.resolution}^2, "
            f"{dataset.label_dim} classes",
            f"Generator: {generator.img_channels} x {generator.img_resolution}^2, {generator.label_dim} classes",
            f"Operators: {summary(parts.operators)}",
            str(parts.frozen),
            f"Discriminator: {backbones / 1e6:.2f} M frozen in backbones and projections, "
            f"{heads / 1e6:.2f} M trained in heads",
        ]
    )
