"""What a distillation run can be told, one frozen dataclass per concern, and the presets of the paper.

Field names are flag names: `TrainConfig().discriminator.disc_resolution` is `--disc-resolution`.
Recipes: Zheng & Yang, "Diffusion Models Are Innate One-Step Generators" (arXiv 2405.20750) and its public code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError, require
from gdd_fast.settings import Settings

Precision = Literal["fp32", "tf32", "bf16"]
Reduction = Literal["rows", "heads"]
StepEngine = Literal["auto", "eager", "graph"]
Nonfinite = Literal["skip", "replace"]
Initialisation = Literal["teacher", "random", "shuffled"]

LOGGERS = ("tensorboard", "wandb")
MAX_SEED = 2**63 - 1
MAX_HEAD_WIDTH = 16  # 256 times the paper's weights
MAX_DISC_RESOLUTION = 4096
DEMO = "demo"  # as --data or --teacher: the asset bundled with the package
CLASS_TABLES = ("imagenet", "learned", "per-head")
CLASS_TABLE_FILES = (".pkl", ".safetensors", ".npy")
AUTO = "auto"  # what a configuration without preset says: see recipe_for


@dataclass(frozen=True)
class DataConfig(Settings):
    """The real images."""

    data: str | None = None
    """EDM-style zip, folder or npz of images; `demo` is the bundled set."""
    cond: bool = False
    """Train class-conditionally, with the labels of the data set."""
    x_flip: bool = False
    """Add the mirror image of every image to the data set. The paper does not."""
    workers: int = 2
    """Processes that decode images when the data set is too large to be held in memory."""
    data_memory_gib: float = 4.0
    """Hold the data set as one uint8 tensor on the training device if it is no larger than this."""


@dataclass(frozen=True)
class GeneratorConfig(Settings):
    """The one-step generator and its optimizer."""

    teacher: str | None = None
    """Pretrained network: EDM .pkl, converted folder, or a pipeline of diffusers' as a folder or the name of a Hub
    repository, such as google/ddpm-cifar10-32; `demo` is the bundled teacher."""
    sigma_init: float | None = None
    """Noise level of the one step: 80 for EDM's networks; for others what docs/teachers.md says of their prediction."""
    freeze: int = 1
    """0: train everything (GDD); 1: freeze convolutions (GDD-I); 2: also qkv; 3: also skip convolutions."""
    g_lr: float = 1e-4
    """Adam learning rate; betas (0, 0.99), eps 1e-8."""
    g_precision: Precision = "bf16"
    """Compute precision of the U-Net. Parameters, group norm and softmax stay fp32."""
    ema_halflife_mimg: float = 0.5
    """Half-life of the generator's moving average, in millions of images."""
    ema_rampup: float = 0.05
    """The half-life is at most this fraction of the images seen so far; 0 disables the ramp-up."""


@dataclass(frozen=True)
class DiscriminatorConfig(Settings):
    """Frozen feature networks, their random projection, and the trainable heads."""

    backbones: tuple[str, ...] = ("vgg16_bn", "tf_efficientnet_lite0")
    """Frozen ImageNet networks whose features are judged."""
    backbone_weights: tuple[str, ...] = ()
    """Local weight files, each `name=path` (.safetensors, .pt or .pth)."""
    disc_resolution: int = 224
    """Images are resized to this many pixels before the backbones."""
    head_width: float = 1.0
    """Scales the channels of the heads' convolutions; 1 is the paper's."""
    class_embedding: str = "imagenet"
    """Class table of conditional heads. `imagenet`: the weight of EfficientNet-lite0's classifier, 1,000 x 1,280,
    scaled to mean 0 and deviation 1, frozen; for N classes its first N rows. `learned`: N x 320, trained from scratch.
    `per-head`: as `learned`, and one for each head, as in the public code. A path (.pkl, .safetensors, .npy): as
    `per-head`, from the table in the file; the public code's is in_embeddings/tf_efficientnet_lite0.pkl."""
    backbone_statistics: Literal["published", "probed"] = "published"
    """Of the backbones' batch norms. `probed`: as the public code leaves them, moved by a tenth towards those of one
    image of zeros, which it sends through them in training mode to learn the sizes of their maps."""
    spectral_start: Literal["iterated", "random"] = "iterated"
    """Vectors that the heads' spectral norms start from: after 15 power iterations, or random as in the public code."""
    d_lr: float = 1e-4
    """Adam learning rate before the lazy-regularisation correction; betas (0, 0.99), eps 1e-8."""
    d_precision: Precision = "fp32"
    """Compute precision of backbones and heads. Their parameters, spectral norms, batch statistics, logits and losses
    are fp32 in any case, and so is the R1 penalty of the images' gradient. The public recipe is fp32 without TF32."""


@dataclass(frozen=True)
class LossConfig(Settings):
    """The GAN loss."""

    logit_reduction: Reduction = "rows"
    """`rows`: as the public code, an image's mean over positions, summed over backbones and the images of a process; so
    R1 weighs less the more images a process has. `heads`: the mean over images and positions, summed over heads."""
    r1_gamma: float = 1e-4
    """Weight of the R1 penalty on real images."""
    r1_interval: int = 16
    """Iterations between R1 steps; 0 disables R1."""
    r1_precision: Precision = "fp32"
    """Compute precision of backbones and heads in the R1 step. Its gradient goes through the backbones twice, and bf16
    turns it by 20 to 30 degrees (docs/precision.md)."""


@dataclass(frozen=True)
class AblationConfig(Settings):
    """What the paper's loss and its start are compared with. The defaults are the paper's method: none of it."""

    gan: Literal["on", "off"] = "on"
    """`off`: the discriminator neither judges nor trains, for a loss below alone."""
    init: Initialisation = "teacher"
    """What the generator starts from: the teacher's weights, `random` ones of its form, or `shuffled`: the teacher's,
    with the channels in another order in every weight that is frozen (with --freeze 0: that GDD-I freezes)."""
    teacher_loss: Literal["none", "pd", "cd", "ctm"] = "none"
    """Added to the GAN's: progressive distillation, consistency distillation, consistency trajectory."""
    teacher_loss_weight: float = 1.0
    """What its mean over images is multiplied with, beside a mean of the GAN's."""
    teacher_loss_distance: Literal["l2", "pseudo-huber", "lpips", "lpips-vgg"] = "l2"
    """Between the images that it compares. LPIPS's weights come from --feature-weights lpips=PATH."""
    teacher_loss_levels: int = 18
    """Noise levels of cd and ctm, from 0.002 to the one of the one step."""
    target_ema: float = 0.0
    """Decay, each iteration, of the average that is the target of cd and ctm; 0: the generator itself."""
    pd_steps: int = 8
    """Steps of the student in the first stage of pd, a power of two; each stage halves them, the last has 1."""
    pd_stage_kimg: float = 50.0
    """Thousands of images of each stage of pd but the last, which lasts to the end of the run."""
    ctm_solver_steps: int = 3
    """Steps that ctm's teacher solves at most, from one of its noise levels to the next."""
    ctm_dsm_weight: float = 1.0
    """Weight of ctm's denoising score matching within its loss."""
    frechet_loss: tuple[str, ...] = ()
    """Feature networks, as gdd_fast.evaluate names them, whose Frechet distance to the data is added to the loss."""
    frechet_weight: float = 1.0
    """What their sum is multiplied with, each distance divided by the variance of the data's features."""
    frechet_population: int = 50_000
    """Generated images that the statistics are of, the latest; more than there are features."""
    frechet_refresh: int = 1
    """Iterations between new statistics."""

    @property
    def adds_losses(self) -> bool:
        return self.teacher_loss != "none" or bool(self.frechet_loss)


@dataclass(frozen=True)
class RunConfig(Settings):
    """Length, size and output of the run."""

    run_dir: Path | None = None
    """Output folder; running the same command again resumes what it holds. Default: runs/<preset>."""
    duration_mimg: float = 5.0
    """Length of the run, in millions of real images."""
    batch: int = 256
    """Images per iteration, over all GPUs."""
    batch_gpu: int | Literal["auto"] | None = None
    """Largest number of images through the networks at once; gradients accumulate over the rest. `auto`: as many as
    the GPU's memory holds by the forecast that `--dry-run` prints; on a CPU all."""
    seed: int = 0
    """Seeds the data order, the latents, the heads and the random projection; from 0 to 2**63 - 1."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best there is, `torch` their definitions. A
    named one runs the operators that have it, and their definitions for the others."""
    engine: StepEngine = "auto"
    """How the steps of an iteration run: `eager`, operator after operator; `graph`, as CUDA graphs that are captured
    after the first iterations, so that the GPU does not wait for the host. `auto` is `eager` until a GPU has
    run `graph`, which is checked on a CPU so far (gdd_fast.training.rehearsal)."""
    tick_kimg: float = 20.0
    """Thousands of images between metric lines with a sample grid."""
    checkpoint_ticks: int = 10
    """Ticks between checkpoints. One is always written at the end, on SIGINT and on SIGTERM."""
    keep_checkpoints: int = 1
    """How many checkpoints to keep: the newest, and those before it as checkpoint-IMAGES.safetensors."""
    max_hours: float | None = None
    """Stop, with the state saved, after training for so long; the exit status is then 75. For queues with a limit."""
    max_skipped_steps: int = 10
    """Stop, with the state saved, after this many steps in a row whose gradients were not finite."""
    nonfinite: Nonfinite = "skip"
    """A step with a gradient that is not finite: `skip` leaves it out, whole; `replace` sets NaN to 0 and infinities to
    +-1e5 and takes it, as the public code does."""
    evaluate_images: int = 0
    """At the end, print the Frechet distance of this many images of teacher, untrained and distilled generator."""
    evaluate_data: str | None = None
    """The images those are compared with, best ones not trained on; default: the training data."""
    evaluate_ticks: int = 0
    """Ticks between measurements of the averaged generator with `evaluate_images` images; 0: at the end alone."""
    evaluate_metrics: str = "fd@lite0"
    """What is measured then, as `gdd_fast.evaluate --metrics` takes it; of each value the best generator is kept."""
    evaluate_at_start: bool = False
    """Measure teacher and untrained generator before the first iteration."""
    evaluate_ref: tuple[str, ...] = ()
    """Statistics of real images for `evaluate_metrics`, as `gdd_fast.evaluate --ref` takes them."""
    feature_weights: tuple[str, ...] = ()
    """Local weight files of the networks of `evaluate_metrics`, each `name=path`."""
    log: str = "auto"
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, `tensorboard,wandb`, or none. `auto`: TensorBoard
    where it is installed."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole distillation run."""

    preset: str = DEMO
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def run_dir(self) -> Path:
        return self.run.run_dir or Path("runs") / self.preset

    @property
    def total_images(self) -> int:
        return round(self.run.duration_mimg * 1e6)

    def missing(self) -> list[str]:
        """What has to be given yet before the run can begin."""
        needed = {
            "no data set: pass --data PATH (an EDM-style zip or a folder of images)": self.data.data,
            "no teacher: pass --teacher PATH (an EDM .pkl or a converted folder)": self.generator.teacher,
        }
        return [message for message, path in needed.items() if path is None]

    def validate(self) -> None:
        """Raise one `ConfigError` for the first setting that is missing or cannot work. Reads no file."""
        for message in self.missing():
            raise ConfigError(message)
        self.validate_settings()

    def validate_settings(self) -> None:
        """`validate`, but for what is `missing`."""
        run, loss = self.run, self.loss
        for section in (self.data, self.generator, self.discriminator, loss, self.ablation, run):
            check_values(section)
        sigma = self.generator.sigma_init
        require(sigma is None or sigma > 0, f"--sigma-init is a noise level above 0, not {sigma}")
        require(0 <= self.generator.freeze <= 3, f"--freeze is 0, 1, 2 or 3, not {self.generator.freeze}")
        require(run.batch >= 2, f"--batch must be at least 2 (the heads use batch norm), not {run.batch}")
        few = run.batch_gpu not in (None, AUTO) and int(run.batch_gpu) < 2
        require(not few, f"--batch-gpu must be at least 2, not {run.batch_gpu}")
        require(self.total_images >= 1, f"--duration-mimg must be positive, not {run.duration_mimg}")
        require(run.tick_kimg > 0, f"--tick-kimg must be positive, not {run.tick_kimg}")
        check_seed(run.seed)
        require(run.checkpoint_ticks >= 1, f"--checkpoint-ticks must be at least 1, not {run.checkpoint_ticks}")
        require(run.keep_checkpoints >= 1, f"--keep-checkpoints must be at least 1, not {run.keep_checkpoints}")
        require(run.max_hours is None or run.max_hours > 0, f"--max-hours must be positive, not {run.max_hours}")
        require(run.max_skipped_steps >= 1, f"--max-skipped-steps must be at least 1, not {run.max_skipped_steps}")
        require(run.evaluate_images >= 0, f"--evaluate-images must be at least 0, not {run.evaluate_images}")
        require(run.evaluate_images != 1, "--evaluate-images 1: a covariance needs at least 2 images")
        require(run.evaluate_ticks >= 0, f"--evaluate-ticks must be at least 0, not {run.evaluate_ticks}")
        measured = bool(run.evaluate_ticks) or run.evaluate_at_start
        require(
            not measured or run.evaluate_images > 0,
            "--evaluate-ticks and --evaluate-at-start need images to measure: --evaluate-images 5000, for instance",
        )
        require(measured or not run.evaluate_ref, "--evaluate-ref: nothing is measured")
        require(
            measured or self.ablation.adds_losses or not run.feature_weights,
            "--feature-weights: nothing is measured, and no loss looks through a feature network",
        )
        self._validate_ablation()
        loggers(run.log)
        self.feature_weight_paths()
        require(self.data.workers >= 0, f"--workers must be at least 0, not {self.data.workers}")
        require(self.data.data_memory_gib >= 0, "--data-memory-gib cannot be negative")
        require(self.generator.g_lr >= 0 and self.discriminator.d_lr >= 0, "learning rates cannot be negative")
        require(self.generator.ema_halflife_mimg > 0, "--ema-halflife-mimg must be positive")
        require(self.generator.ema_rampup >= 0, "--ema-rampup cannot be negative")
        require(loss.r1_gamma >= 0 and loss.r1_interval >= 0, "--r1-gamma and --r1-interval cannot be negative")
        require(
            0 < self.discriminator.head_width <= MAX_HEAD_WIDTH,
            f"--head-width must be positive and at most {MAX_HEAD_WIDTH}, not {self.discriminator.head_width}",
        )
        resolution = self.discriminator.disc_resolution
        require(
            1 <= resolution <= MAX_DISC_RESOLUTION,
            f"--disc-resolution must be from 1 to {MAX_DISC_RESOLUTION}, not {resolution}",
        )
        table = self.discriminator.class_embedding
        require(
            table in CLASS_TABLES or Path(table).suffix in CLASS_TABLE_FILES,
            f"--class-embedding is one of {', '.join(CLASS_TABLES)} or the path of a {', '.join(CLASS_TABLE_FILES)} "
            f"file, not {table!r}",
        )
        require(len(self.discriminator.backbones) >= 1, "--backbones needs at least one name")
        require(
            len(set(self.discriminator.backbones)) == len(self.discriminator.backbones), "--backbones names one twice"
        )
        require(
            {self.generator.g_precision, self.discriminator.d_precision} != {"fp32", "tf32"},
            "fp32 and tf32 cannot be mixed: TF32 is one switch for the whole backward pass; "
            "give --g-precision and --d-precision the same one, or use bf16",
        )
        self.backbone_weight_paths()

    def _validate_ablation(self) -> None:
        options, engine = self.ablation, self.run.engine
        require(
            options.gan == "on" or options.adds_losses,
            "--gan off leaves no loss: add --teacher-loss or --frechet-loss",
        )
        require(engine != "graph" or not options.adds_losses, "--engine graph does not capture the losses of ablations")
        weights = (options.teacher_loss_weight, options.frechet_weight, options.ctm_dsm_weight)
        require(min(weights) >= 0, "weights of losses cannot be negative")
        require(
            options.teacher_loss_levels >= 2,
            f"--teacher-loss-levels must be at least 2, not {options.teacher_loss_levels}",
        )
        require(0 <= options.target_ema < 1, f"--target-ema is from 0 to below 1, not {options.target_ema}")
        require(options.ctm_solver_steps >= 1, "--ctm-solver-steps must be at least 1")
        steps = options.pd_steps
        require(steps >= 1 and steps & (steps - 1) == 0, f"--pd-steps must be a power of two, not {steps}")
        require(options.pd_stage_kimg >= 0.001, "--pd-stage-kimg must be at least 0.001")
        stages = (steps.bit_length() - 1) * round(options.pd_stage_kimg * 1e3)
        require(
            options.teacher_loss != "pd" or stages < self.total_images,
            f"--duration-mimg {self.run.duration_mimg} ends before the student has one step: --pd-steps {steps} and "
            f"--pd-stage-kimg {options.pd_stage_kimg} take {stages:,} images to get there",
        )
        require(len(set(options.frechet_loss)) == len(options.frechet_loss), "--frechet-loss names a network twice")
        require(options.frechet_population >= 2, "--frechet-population must be at least 2")
        require(options.frechet_refresh >= 1, "--frechet-refresh must be at least 1")

    def feature_weight_paths(self) -> dict[str, Path]:
        """`--feature-weights name=path ...` as a mapping; raises `ConfigError` for a malformed entry."""
        return named_paths("--feature-weights", self.run.feature_weights)

    def backbone_weight_paths(self) -> dict[str, Path]:
        """`--backbone-weights name=path ...` as a mapping; raises `ConfigError` for a malformed or unused entry."""
        paths, names = {}, self.discriminator.backbones
        for entry in self.discriminator.backbone_weights:
            name, equals, path = entry.partition("=")
            require(bool(equals and path), f"--backbone-weights takes name=path, not {entry!r}")
            require(name in names, f"--backbone-weights names {name!r}, not among --backbones {' '.join(names)}")
            paths[name] = Path(path)
        return paths


def named_paths(flag: str, entries: Sequence[str]) -> dict[str, Path]:
    """`--flag name=path ...` as a mapping; raises `ConfigError` for a malformed entry."""
    for entry in entries:
        require(all(entry.partition("=")[::2]), f"{flag} takes name=path, not {entry!r}")
    return {name: Path(path) for name, _, path in (entry.partition("=") for entry in entries)}


def loggers(log: str) -> tuple[str, ...]:
    """The names in `--log`, none for "none"; raises `ConfigError` for another name."""
    names = tuple(name.strip() for name in log.split(","))
    if names in (("auto",), ("none",)):
        return () if names == ("none",) else names
    for name in names:
        require(name in LOGGERS, f"--log is auto, none, or some of {', '.join(LOGGERS)}, not {name!r}")
    return names


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that torch's generators do not take."""
    require(0 <= seed <= MAX_SEED, f"--seed must be from 0 to {MAX_SEED}, not {seed}")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def check_values(section: Any) -> None:
    """Raise `ConfigError` for a dataclass field that is none of its literals, or a number that is not finite."""
    for f in fields(section):
        value = getattr(section, f.name)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ConfigError(f"--{_flag(f.name)} is one of {', '.join(get_args(f.type))}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{_flag(f.name)} must be finite, not {value}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types."""
    return {
        f.name: to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else _plain(value)
        for f in fields(config)
        for value in [getattr(config, f.name)]
    }


def default_settings(config: Any) -> dict[str, Any]:
    """The defaults of a configuration's class, as `to_dict` gives them."""
    return to_dict(type(config)())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; unknown keys raise `ConfigError`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} is made from a mapping of settings, not {values!r}")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown settings in {cls.__name__}: {', '.join(unknown)}")
    arguments = {}
    for name, value in values.items():
        kind = known[name].type
        if isinstance(kind, type) and is_dataclass(kind):
            value = from_dict(kind, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and kind == Path | None:
            value = Path(value)
        arguments[name] = value
    return cls(**arguments)


def override(config: TrainConfig, **settings: Any) -> TrainConfig:
    """A configuration with some settings changed, each by the name of its flag: `override(preset("demo"), g_lr=1e-4)`.

    Raises ConfigError for a setting that no section has.
    """
    changed = config
    for name, value in settings.items():
        for section in fields(config):
            old: Any = getattr(changed, section.name)
            if is_dataclass(old) and not isinstance(old, type) and any(f.name == name for f in fields(old)):
                new: dict[str, Any] = {section.name: replace(old, **{name: value})}
                changed = replace(changed, **new)
                break
        else:
            raise ConfigError(f"there is no setting {name!r}")
    return changed


# What a resumed run may change; everything else is part of the recipe and has to stay. Data and teacher may
# change their path alone: their contents are compared (gdd_fast.data.fingerprint).
RESUMABLE = frozenset(
    {"preset", "run_dir", "duration_mimg", "batch_gpu", "device", "backend", "engine", "tick_kimg", "checkpoint_ticks"}
    | {"max_skipped_steps", "evaluate_images", "evaluate_data", "workers", "data_memory_gib", "backbone_weights"}
    | {"evaluate_ticks", "evaluate_metrics", "evaluate_at_start", "evaluate_ref", "feature_weights", "log"}
    | {"data", "teacher", "keep_checkpoints", "max_hours"}
)
# What may change in addition while a run is not finished, as one that diverges goes on only so; it is recorded.
ADJUSTABLE = frozenset({"batch", "g_lr", "d_lr", "g_precision", "d_precision", "r1_precision", "lr", "precision"})


def differences(
    old: dict[str, Any],
    new: dict[str, Any],
    ignore: frozenset[str] = RESUMABLE,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    prefix: str = "",
) -> list[str]:
    """Settings in which two `to_dict` configurations differ, not those to `ignore`: `section.name: old -> new`.

    A setting that `old` lacks, because it is of a version that did not have it, is taken from `defaults`: a default is
    what the program did before there was a choice.
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, defaults.get(name)), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, ignore, defaults.get(name) or {}, f"{prefix}{name}.")
        elif a != b and name not in ignore:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found


def given(path: str | None, flag: str) -> str:
    """A path that `validate` has made sure of. Raises ConfigError without one."""
    if path is None:
        raise ConfigError(f"no {flag} was given")
    return path


_VGG = ("vgg16_bn", "tf_efficientnet_lite0")
_DEIT = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")


def _recipe(
    cond: bool,
    backbones: tuple[str, ...],
    g_lr: float,
    d_lr: float,
    mimg: float,
    ema: float = 0.5,
    batch: int = 256,
) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(cond=cond),
        generator=GeneratorConfig(g_lr=g_lr, ema_halflife_mimg=ema),
        discriminator=DiscriminatorConfig(backbones=backbones, d_lr=d_lr, d_precision="bf16"),
        loss=LossConfig(r1_precision="tf32"),
        run=RunConfig(duration_mimg=mimg, batch=batch),
    )


_RECIPES = {
    "cifar10-uncond": _recipe(False, _VGG, 1e-4, 1e-4, mimg=5),
    "cifar10-cond": _recipe(True, _VGG, 1e-4, 1e-4, mimg=5),
    "afhqv2-64": _recipe(False, _DEIT, 2e-5, 4e-5, mimg=10),
    "ffhq-64": _recipe(False, _DEIT, 2e-5, 4e-5, mimg=10),
    "imagenet-64": _recipe(True, _DEIT, 8e-6, 4e-5, mimg=10, ema=50, batch=512),
    # The bundled teacher on the bundled data, sized for two CPU cores; docs/study.md says how it was chosen.
    DEMO: TrainConfig(
        data=DataConfig(data=DEMO),
        generator=GeneratorConfig(teacher=DEMO, g_lr=1e-3, g_precision="fp32", ema_halflife_mimg=0.003, ema_rampup=0.1),
        discriminator=DiscriminatorConfig(
            backbones=("tf_efficientnet_lite0",), disc_resolution=32, head_width=0.25, d_lr=3e-4
        ),
        loss=LossConfig(r1_gamma=3e-3),
        run=RunConfig(duration_mimg=0.028, batch=32, tick_kimg=2, evaluate_images=2000, evaluate_data="demo-test"),
    ),
}


def _freeze_variant(name: str, recipe: TrainConfig, level: int) -> TrainConfig:
    return replace(recipe, preset=name, generator=replace(recipe.generator, freeze=level))


def _presets() -> dict[str, TrainConfig]:
    presets = {}
    for name, recipe in _RECIPES.items():
        for suffix, level in (("-gdd", 0), ("-gdd-i", 1)):
            if (name, suffix) == (DEMO, "-gdd-i"):
                suffix = ""  # the demo is GDD-I; `demo-gdd` beside it shows what freezing brings
            presets[name + suffix] = _freeze_variant(name + suffix, recipe, level)
    return presets


PRESETS: dict[str, TrainConfig] = _presets()


def recipe_for(resolution: int, parameters: int, classes: int) -> TrainConfig:
    """The recipe for a teacher that no preset is of, from the one whose network is most like it.

    `resolution` in pixels; `parameters` and `classes` are counts. GDD-I, as its presets are: the demo's settings for
    small networks, CIFAR-10's up to 32 pixels, FFHQ's above, ImageNet's for networks of its size. Data, teacher and the
    data to evaluate with are nobody's.
    """
    if parameters >= 150_000_000:
        like = "imagenet-64"
    elif resolution > 32:
        like = "ffhq-64"
    else:
        like = "cifar10-uncond" if parameters >= 10_000_000 else DEMO
    recipe = _freeze_variant(AUTO, _RECIPES[like], 1)
    return override(recipe, cond=classes > 0, data=None, teacher=None, evaluate_images=0, evaluate_data=None)


RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"g_precision": "bf16", "d_precision": "bf16", "r1_precision": "tf32"},
    "public": {
        "g_precision": "bf16",
        "d_precision": "fp32",
        "r1_precision": "fp32",
        "backbone_statistics": "probed",
        "class_embedding": "per-head",
        "spectral_start": "random",
        "nonfinite": "replace",
        "logit_reduction": "rows",
    },
}
"""What `--precision` sets, by flag: docs/precision.md. The presets are `fast`, but for the demo's, which are fp32."""


def preset(name: str, precision: str | None = None) -> TrainConfig:
    """The named preset, with the settings of `RECIPES[precision]` if that is given.

    Raises `ConfigError` that lists the names there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name] if precision is None else in_precision(PRESETS[name], precision)


def in_precision(config: TrainConfig, precision: str) -> TrainConfig:
    """`config` with the settings of `RECIPES[precision]`; raises `ConfigError` for another name."""
    if precision not in RECIPES:
        raise ConfigError(f"--precision is one of {', '.join(RECIPES)}, not {precision!r}")
    return override(config, **RECIPES[precision])
