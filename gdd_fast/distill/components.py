"""Builds the parts of a distillation run. Everything that bad input can break happens here, before the first step."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.backend import Backend, resolve_all
from gdd_fast.config import CLASS_TABLES, Precision, TrainConfig, given
from gdd_fast.data import ImageDataset, load_data
from gdd_fast.data.fingerprint import dataset_digest
from gdd_fast.device import fast_layout, pick_device
from gdd_fast.distill.additional_losses import AdditionalParts, additional_parts
from gdd_fast.distill.freeze import FreezeReport, freeze
from gdd_fast.distill.initialisation import start_from
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.interop import hub
from gdd_fast.layers.backends import choose_backend
from gdd_fast.models.backbone_weights import load_backbone_weights
from gdd_fast.models.backbones import build_backbone, fold_batch_norm, probe_batch_norm
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures
from gdd_fast.models.files.class_table import read_class_table
from gdd_fast.models.files.load import as_generator, load_generator, network_digest
from gdd_fast.models.preconditioned import Preconditioned
from gdd_fast.ops.adam_ema import OPERATOR as ADAM_EMA
from gdd_fast.ops.group_norm_silu import OPERATOR as GROUP_NORM_SILU

# Operators that a run calls outside its networks, in the optimizer's steps.
OPERATORS = (ADAM_EMA,)


@dataclass
class Components:
    """The networks of a run and its data, on the CPU, and the backend of each fused operator, by name."""

    dataset: ImageDataset
    generator: Preconditioned
    frozen: FreezeReport
    features: ProjectedFeatures
    r1_features: ProjectedFeatures
    """`features` in the R1 step's precision; the same object if the precision is the same."""
    heads: DiscriminatorHeads
    operators: dict[str, Backend]
    contents: dict[str, str]
    """Digests of the contents of --data ("data") and --teacher ("teacher")."""
    additional: AdditionalParts | None = None
    """What the additional losses need; None without any."""


def dtype_of(precision: Precision) -> torch.dtype:
    """The compute dtype of a precision; tf32 is float32 with a switch set."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def build(config: TrainConfig) -> Components:
    """All parts of a run; unless an ablation changes that, the generator starts with the teacher's weights.

    Raises:
        ConfigError, BackendError, DataError, WeightsError, UnsafePickleError: what the user has to correct.
    """
    config.validate()
    device = pick_device(config.run.device).type
    # refuse a backend that cannot run here before reading anything: every backend has one of these operators
    resolve_all(config.run.backend, (ADAM_EMA, GROUP_NORM_SILU), device)
    dataset = load_data(given(config.data.data, "--data"), use_labels=config.data.cond)
    teacher = load_teacher(given(config.generator.teacher, "--teacher"))
    generator = _generator(config, teacher)
    check_fit(generator, dataset, given(config.data.data, "--data"))
    contents = {"data": dataset_digest(dataset), "teacher": network_digest(teacher)}
    # last, as these may have to be downloaded
    weights = {
        name: load_backbone_weights(name, config.backbone_weight_paths().get(name))
        for name in config.discriminator.backbones
    }
    features = r1_features = build_features(config, weights, config.discriminator.d_precision)
    if config.loss.r1_interval and dtype_of(config.loss.r1_precision) != features.dtype:
        r1_features = build_features(config, weights, config.loss.r1_precision)
    heads = build_heads(config, features, dataset.label_dim, weights)
    frozen = freeze(generator, config.generator.freeze)
    if config.ablation.frechet_loss and len(dataset) < 2:
        raise ConfigError("--frechet-loss: the data set holds only one image; a covariance needs at least 2")
    additional = additional_parts(config, teacher, generator)
    networks = [generator, features, r1_features, heads, *(additional.networks() if additional else ())]
    operators = choose_backend(config.run.backend, device, networks, OPERATORS)
    return Components(dataset, generator, frozen, features, r1_features, heads, operators, contents, additional)


def with_generator_from(start: Preconditioned, config: TrainConfig, parts: Components) -> Components:
    """`parts`, of a run that has not trained yet, with a generator built from `start`."""
    generator = _generator(config, start)
    frozen = freeze(generator, config.generator.freeze)
    device = pick_device(config.run.device).type
    operators = {**parts.operators, **choose_backend(config.run.backend, device, [generator], OPERATORS)}
    return replace(parts, generator=generator, frozen=frozen, operators=operators)


def _generator(config: TrainConfig, start: Preconditioned) -> Preconditioned:
    begun = start_from(start, config.ablation.init, config.generator.freeze, config.run.seed)
    generator = as_generator(begun, config.generator.sigma_init)
    generator.dtype = dtype_of(config.generator.g_precision)
    return generator


def load_teacher(name: str) -> Preconditioned:
    """The pretrained network at a path or Hub repository, in float32 on the CPU.

    Raises WeightsError if there is no network or if it has weights that are not finite.
    """
    teacher = load_generator(hub.network_path(name))
    broken = next((name for name, tensor in teacher.state_dict().items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise WeightsError(
            f"the teacher {name} has NaN or infinite values in {broken}: use one of its earlier checkpoints, or "
            "copy the file again"
        )
    return teacher


def build_features(
    config: TrainConfig, weights: dict[str, dict[str, Tensor]], precision: Precision
) -> ProjectedFeatures:
    """The frozen half of the discriminator: backbones with folded batch norm, and the random projection."""
    options = config.discriminator
    backbones = [build_backbone(name, weights[name], options.disc_resolution) for name in options.backbones]
    if options.backbone_statistics == "probed":
        backbones = [probe_batch_norm(backbone) for backbone in backbones]
    return ProjectedFeatures(
        [fold_batch_norm(backbone) for backbone in backbones],
        options.disc_resolution,
        seed=config.run.seed,
        dtype=dtype_of(precision),
        layout=fast_layout(pick_device(config.run.device), precision),
    )


def build_heads(
    config: TrainConfig, features: ProjectedFeatures, label_dim: int, weights: dict[str, dict[str, Tensor]]
) -> DiscriminatorHeads:
    """The trainable half of the discriminator, initialised from the run's seed."""
    embedding = None
    if label_dim and config.discriminator.class_embedding == "imagenet":
        lite0 = weights.get("tf_efficientnet_lite0")
        if lite0 is None:
            raise ConfigError(
                "--class-embedding imagenet comes from EfficientNet-lite0: add tf_efficientnet_lite0 to --backbones "
                "or use --class-embedding learned"
            )
        embedding = lite0["classifier.weight"]
    from_file = config.discriminator.class_embedding not in CLASS_TABLES
    if label_dim and from_file:
        embedding = read_class_table(Path(config.discriminator.class_embedding))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return DiscriminatorHeads(
            features.channels,
            features.resolutions,
            label_dim=label_dim,
            embedding=embedding,
            dtype=dtype_of(config.discriminator.d_precision),
            width=config.discriminator.head_width,
            tables_per_head=from_file or config.discriminator.class_embedding == "per-head",
            spectral_random=config.discriminator.spectral_start == "random",
        )


def check_fit(generator: Preconditioned, dataset: ImageDataset, data: str) -> None:
    """Raise WeightsError unless the network's images have the size, channels and classes of `dataset`, named `data`."""
    ours = (dataset.channels, dataset.resolution)
    teachers = (generator.img_channels, generator.img_resolution)
    if ours != teachers:
        raise WeightsError(
            f"the teacher makes {teachers[0]} x {teachers[1]}^2 images, {data} holds {ours[0]} x "
            f"{ours[1]}^2; use a matching pair, or python -m gdd_fast.prepare to resize the images"
        )
    if generator.label_dim != dataset.label_dim:
        raise WeightsError(
            f"the teacher has {generator.label_dim} classes, but the data set is read with {dataset.label_dim}; "
            "--cond and --no-cond choose whether labels are used"
        )
