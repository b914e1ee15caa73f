"""The settings of a distillation run, one frozen dataclass per concern.

Field names are flag names: `TrainConfig().discriminator.disc_resolution` is `--disc-resolution`. The docstring under a
field is its help text. The ablations' settings are in ablation.py, the checks of values in checks.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gdd_fast.config import checks
from gdd_fast.config.ablation import AblationConfig
from gdd_fast.errors import ConfigError
from gdd_fast.settings import Limit, LoopSettings, NotNegative, Positive, Settings

Precision = Literal["fp32", "tf32", "bf16"]
Reduction = Literal["rows", "heads"]
StepEngine = Literal["auto", "eager", "graph", "compile", "threads"]
Nonfinite = Literal["skip", "replace"]

DEMO = "demo"  # value of --data or --teacher: the asset bundled with the package


@dataclass(frozen=True)
class DataConfig(Settings):
    """The real images."""

    data: str | None = None
    """EDM-style zip, folder or npz of images; `demo` is the bundled set."""
    cond: bool = False
    """Train class-conditionally, with the labels of the data set."""
    x_flip: bool = False
    """Add the mirror image of every image to the data set. The paper does not do this."""
    workers: Annotated[int, Limit(0)] = 2
    """Processes that decode images when the data set is too large to hold in memory."""
    data_memory_gib: NotNegative = 4.0
    """Hold the data set as one uint8 tensor on the training device if it is no larger than this."""


@dataclass(frozen=True)
class GeneratorConfig(Settings):
    """The one-step generator and its optimizer."""

    teacher: str | None = None
    """Pretrained network: EDM .pkl, converted folder, or a diffusers pipeline as a folder or the name of a Hub
    repository, such as google/ddpm-cifar10-32; `demo` is the bundled teacher."""
    sigma_init: Annotated[float | None, Limit(0, above=True)] = None
    """Noise level of the one step. Default: 80 for EDM's networks; for others see docs/teachers.md."""
    velocity_kimg: NotNegative = 0.0
    """Thousands of images for which a diffusers teacher that predicts noise first learns to predict v
    (docs/teachers.md); 0: it is distilled as it is."""
    freeze: int = 1
    """0: train everything (GDD); 1: freeze convolutions (GDD-I); 2: freeze qkv too; 3: freeze skip convolutions too."""
    g_lr: NotNegative = 1e-4
    """Adam learning rate; betas (0, 0.99), eps 1e-8."""
    g_precision: Precision = "bf16"
    """Compute precision of the U-Net. Parameters, group norms and softmax stay fp32."""
    ema_halflife_mimg: Positive = 0.5
    """Half-life of the generator's moving average, in millions of images."""
    ema_rampup: NotNegative = 0.05
    """The half-life is at most this fraction of the images seen so far; 0 disables the ramp-up."""


@dataclass(frozen=True)
class DiscriminatorConfig(Settings):
    """Frozen feature networks, their random projection, and the trainable heads."""

    backbones: tuple[str, ...] = ("vgg16_bn", "tf_efficientnet_lite0")
    """Frozen ImageNet networks whose features the heads judge."""
    backbone_weights: tuple[str, ...] = ()
    """Local weight files of backbones, each `name=path` (.safetensors, .pt or .pth)."""
    disc_resolution: int = 224
    """Side in pixels to which images are resized before the backbones."""
    head_width: float = 1.0
    """Scales the number of channels in the heads' convolutions; 1 is the paper's."""
    class_embedding: str = "imagenet"
    """Class table of conditional heads. `imagenet`: the weight of EfficientNet-lite0's classifier, 1,000 x 1,280,
    scaled to mean 0 and standard deviation 1, frozen; for N classes, its first N rows. `learned`: N x 320, trained from
    scratch. `per-head`: as `learned`, but one per head, as in the public code. A path (.pkl, .safetensors, .npy): as
    `per-head`, starting from the table in the file; the public code's is in_embeddings/tf_efficientnet_lite0.pkl."""
    backbone_statistics: Literal["published", "probed"] = "published"
    """Running statistics of the backbones' batch norms: as published with their weights; or `probed`, as the public
    code leaves them: moved by a tenth towards those of an all-zero image, which that code passes through the backbones
    in training mode to find the sizes of their maps."""
    spectral_start: Literal["iterated", "random"] = "iterated"
    """How vectors of the heads' spectral norms start: after 15 power iterations, or random as in the public code."""
    d_lr: NotNegative = 1e-4
    """Adam learning rate before the lazy-regularisation correction; betas (0, 0.99), eps 1e-8."""
    d_precision: Precision = "fp32"
    """Compute precision of backbones and heads. Their parameters, spectral norms, batch statistics, logits and losses
    are always fp32, as is the R1 penalty computed from the images' gradient. The public recipe is fp32 without TF32."""


@dataclass(frozen=True)
class LossConfig(Settings):
    """The GAN loss."""

    logit_reduction: Reduction = "rows"
    """`rows`, as in the public code: each image's mean over positions, summed over backbones and a process's images, so
    R1 weighs less if a process has more images. `heads`: the mean over images and positions, summed over heads."""
    reuse_fakes: bool = False
    """The D step judges the images that the G step made, which saves one of three generator passes. The paper makes new
    ones."""
    r1_gamma: NotNegative = 1e-4
    """Weight of the R1 penalty on real images."""
    r1_interval: Annotated[int, Limit(0)] = 16
    """Iterations between R1 steps; 0 disables R1."""
    r1_precision: Precision = "fp32"
    """Compute precision of backbones and heads in the R1 step. R1's gradient goes through the backbones twice, and bf16
    turns it by 20 to 30 degrees (docs/precision.md)."""


@dataclass(frozen=True)
class RunConfig(LoopSettings):
    """Length, size and output of the run."""

    run_dir: Path | None = None
    """Output folder; running the same command again resumes the run in it. Default: runs/<preset>."""
    batch: Annotated[int, Limit(2)] = 256
    """Images per iteration, over all GPUs."""
    lr_decay_kimg: NotNegative = 0.0
    """Thousands of images after which both learning rates decay as 1 / sqrt(images); 0: they stay constant."""
    batch_gpu: int | Literal["auto"] | None = None
    """Most images per pass through the networks; gradients accumulate over several passes. `auto`: as many as fit into
    the GPU's memory by the forecast that `--dry-run` prints, or half of it if graphs of the steps then fit too; on a
    CPU all."""
    seed: int = 0
    """Seed of the data order, the latents, the heads and the random projection; from 0 to 2**63 - 1."""
    engine: StepEngine = "auto"
    """How the steps of an iteration run. `eager`: operator by operator. `graph`: as CUDA graphs, captured after the
    first iterations, so that the GPU does not wait for the host. `threads`, on a CPU: G steps and the images of the
    next one run beside D steps, each with half of the cores. `compile`, on any device: the losses of the G and D steps
    by torch.compile, forward and backward, which takes minutes at the start; R1 steps stay eager. `auto`: `graph` on a
    GPU if its memory suffices (the run continues eagerly if a capture fails or the first replays differ from eager
    steps), `threads` on a CPU for one process with --reuse-fakes, else `eager`."""
    fsdp: bool = False
    """Shard the generator, its average and its optimizer's moments over torchrun's processes (FSDP2), for a network
    that does not fit on one GPU. Checkpoints are the same as without it."""
    nonfinite: Nonfinite = "skip"
    """What to do with a step whose gradient is not finite: `skip` the whole step, or `replace` NaN by 0 and infinities
    by +-1e5 and take it, as the public code does."""
    evaluate_images: Annotated[int, Limit(0)] = 0
    """At the end, print the Frechet distance of this many images each of teacher, untrained and distilled generator."""
    evaluate_data: str | None = None
    """The real images that these are compared with, preferably not trained on. Default: the training data."""
    evaluate_ticks: Annotated[int, Limit(0)] = 0
    """Ticks between measurements of the averaged generator with --evaluate-images images; 0: only at the end."""
    evaluate_metrics: str = "fd@lite0"
    """What is then measured, as in `gdd_fast.evaluate --metrics`; the best generator by each value is kept."""
    evaluate_at_start: bool = False
    """Measure teacher and untrained generator before the first iteration."""
    evaluate_ref: tuple[str, ...] = ()
    """Statistics of real images for --evaluate-metrics, as for `gdd_fast.evaluate --ref`."""
    feature_weights: tuple[str, ...] = ()
    """Local weight files of the networks in --evaluate-metrics and the ablations' losses, each `name=path`."""
    log: str = "auto"
    """Where metrics go in addition to metrics.jsonl: tensorboard, wandb, `tensorboard,wandb`, or none. `auto`:
    TensorBoard if it is installed."""

    @property
    def measures(self) -> bool:
        """Whether the generator is measured before the end of the run."""
        return self.evaluate_at_start or self.evaluate_ticks > 0


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

    @property
    def is_for_cpus(self) -> bool:
        """Whether it computes only in float32, as the recipes sized for a CPU do."""
        return {self.generator.g_precision, self.discriminator.d_precision, self.loss.r1_precision} == {"fp32"}

    @property
    def has_fixed_steps(self) -> bool:
        """Whether its steps do the same in every iteration, without involving the host or other processes."""
        return not (self.ablation.adds_losses or self.run.debug_finite or self.run.fsdp)

    def missing(self) -> list[str]:
        """One message for each thing that is still needed before the run can begin."""
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
        """`validate`, except for what is `missing`."""
        sections = (self.data, self.generator, self.discriminator, self.loss, self.ablation, self.run)
        for section in sections:
            checks.check_values(section)
        checks.check_generator(self.generator)
        checks.check_discriminator(self.discriminator)
        checks.check_run(self.run)
        checks.check_ablation(self.ablation)
        checks.check_together(self)

    def feature_weight_paths(self) -> dict[str, Path]:
        """`--feature-weights name=path ...` as a mapping; raises `ConfigError` for a malformed entry."""
        return checks.named_paths("--feature-weights", self.run.feature_weights)

    def backbone_weight_paths(self) -> dict[str, Path]:
        """`--backbone-weights name=path ...` as a mapping; raises `ConfigError` for a malformed entry."""
        return checks.named_paths("--backbone-weights", self.discriminator.backbone_weights)


def given(path: str | None, flag: str) -> str:
    """`path`, which `validate` has checked to be given. Raises ConfigError if it is None."""
    if path is None:
        raise ConfigError(f"no {flag} was given")
    return path
