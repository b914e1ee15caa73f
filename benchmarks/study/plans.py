"""What each study trains: data, teacher, runs, and where along them it stops to be judged.

Flags are those of `gdd_fast.pretrain` and `gdd_fast.train`; a study adds nothing to what these commands can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One split of a data set: names looked for in the assets folder, the first found being taken, and how to read it.

    A name of the bundled set (`demo`, `demo-test`) is taken as it is.
    """

    names: tuple[str, ...]
    flags: Flags = field(default_factory=dict)
    """Of `gdd_fast.prepare`."""


@dataclass(frozen=True)
class Run:
    """One distillation."""

    name: str
    title: str
    flags: Flags = field(default_factory=dict)
    milestones: tuple[int, ...] = ()
    """Images after which it is judged; the last is its length."""
    seeds: int = 1
    """Independent trainings."""

    def seeded(self) -> tuple["Run", ...]:
        """Itself, and for each further seed a run `name-s1`, `name-s2`, ..."""
        others = (
            replace(self, name=f"{self.name}-s{s}", flags={**self.flags, "seed": s}, seeds=1)
            for s in range(1, self.seeds)
        )
        return (replace(self, seeds=1), *others)


@dataclass(frozen=True)
class Study:
    """A data set, a teacher and its students."""

    name: str
    title: str
    train: Source
    test: Source
    teacher: Flags | None
    """Of `gdd_fast.pretrain`; its `duration_mimg` is the teacher's length. None: the bundled teacher."""
    preset: str
    base: Flags
    """Of `gdd_fast.train`, for all runs."""
    runs: tuple[Run, ...]
    features: tuple[str, ...] = ("resnet56", "lite2", "lite0", "pixels")
    """The judges, the headline first; all see the same images."""
    images: int = 10_000
    """Generated images of a seed set."""
    seed_sets: int = 3
    teacher_steps: tuple[int, ...] = (18, 1, 2, 4, 8, 35)
    """The first is the figure that students are held against."""

    def all_runs(self) -> tuple[Run, ...]:
        return tuple(seeded for run in self.runs for seeded in run.seeded())


_RESIZED = {"resolution": 16, "filter": "box"}
_JPEG = "cifar10-jpeg-32x32"
_SMALL_TEACHER = {
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
    "batch": 64,
    "tick_kimg": 25,
}
_EARLY = (10_000, 20_000)
_LONG = (*_EARLY, 50_000, 100_000, 200_000)
_MILLION = (*_LONG, 500_000, 1_000_000)
_AT_64 = {"disc_resolution": 64}
# Decomposing 1,280 x 1,280 numbers takes a second here, so not at every batch of 32. The population is 312 such
# batches: at the base's rate and the loss's full weight the generator ran ahead of it, and made one image only.
_FRECHET = {"frechet_loss": ("lite0",), "frechet_population": 10_000, "frechet_refresh": 10}

CIFAR16 = Study(
    name="cifar16",
    title="CIFAR-10 16x16 (from a JPEG copy)",
    train=Source((f"{_JPEG}-train.zip",), _RESIZED),
    test=Source((f"{_JPEG}-test.zip",), _RESIZED),
    # 444,160 images is where the first sitting's time was up; its loss had fallen by 1 % over the last 100,000
    teacher={**_SMALL_TEACHER, "precision": "bf16", "ema_halflife_mimg": 0.05, "duration_mimg": 0.44416},
    preset="demo",
    # every setting of the recipe, so that a run stays what it is when the preset is mended
    base={
        "backbones": ("tf_efficientnet_lite0",),
        "disc_resolution": 32,
        "head_width": 0.25,
        "g_lr": 1e-3,
        "d_lr": 3e-4,
        "r1_gamma": 3e-3,
        "reuse_fakes": False,
        "batch": 32,
        "lr_decay_kimg": 10,
        "ema_halflife_mimg": 0.05,
        "ema_rampup": 0.1,
        "g_precision": "bf16",
        "tick_kimg": 2,
        "checkpoint_ticks": 5,
        "evaluate_images": 0,
    },
    runs=(
        Run("gdd-i", "GDD-I (level 1 frozen)", milestones=(2_000, 5_000, *_MILLION), seeds=3),
        Run("gdd", "GDD (nothing frozen)", {"freeze": 0}, milestones=_LONG, seeds=3),
        Run("random", "GAN from random weights", {"freeze": 0, "init": "random"}, _LONG, seeds=3),
        Run("shuffled", "level 1 frozen, channels shuffled", {"init": "shuffled"}, _LONG),
        Run("level-2", "level 2 frozen (and qkv)", {"freeze": 2}, milestones=_LONG),
        Run("level-3", "level 3 frozen (and skip)", {"freeze": 3}, milestones=_LONG),
        Run("d-bf16", "GDD-I, discriminator in bf16", {"d_precision": "bf16"}, milestones=_LONG, seeds=3),
        Run("no-r1", "GDD-I without R1", {"r1_interval": 0}, milestones=_LONG),
        Run("heads", "GDD-I, logits reduced by heads", {"logit_reduction": "heads"}, milestones=_LONG),
        Run("at-64", "GDD-I, discriminator at 64", _AT_64, milestones=_LONG),
        Run("random-i", "level 1 frozen, random weights", {"init": "random"}, _LONG),
        Run(
            "two-backbones",
            "GDD-I, backbones lite0 and VGG-16",
            # VGG-16 without batch norm is the one whose weights the assets hold
            {
                "backbones": ("tf_efficientnet_lite0", "vgg16"),
                "backbone_weights": ("vgg16={assets}/vgg16-features-fp16.safetensors",),
            },
            milestones=_LONG,
        ),
        Run(
            "consistency",
            "consistency distillation, no GAN, nothing frozen",
            {"teacher_loss": "cd", "gan": "off", "freeze": 0},
            milestones=_LONG,
        ),
        Run(
            "frechet",
            "Frechet loss of lite0, no GAN, level 1 frozen, at a 30th of the rate",
            {**_FRECHET, "gan": "off", "g_lr": 3e-5},
            milestones=_LONG,
        ),
        Run(
            "frechet-gan",
            "GDD-I and a 20th of the Frechet loss of lite0",
            {**_FRECHET, "frechet_weight": 0.05},
            milestones=_LONG,
        ),
    ),
)

FASHION16 = replace(
    CIFAR16,
    name="fashion16",
    title="Fashion-MNIST 16x16, the bundled set",
    train=Source(("demo",)),
    test=Source(("demo-test",)),
    teacher=None,
    # its runs were made before rates could fall
    base={**CIFAR16.base, "lr_decay_kimg": 0, "ema_halflife_mimg": 0.01},
    runs=tuple(replace(run, seeds=1) for run in CIFAR16.runs[:4]),
    images=5_000,
)

_LOSSES = tuple(
    replace(run, milestones=_EARLY, seeds=1)
    for run in CIFAR16.runs
    if run.name in ("level-3", "frechet", "frechet-gan", "at-64", "two-backbones")
)

# Rivals of GDD-I by its loss and its discriminator, under CIFAR16's recipe, from the bundled teacher; and GDD-I for as
# long as there is time.
FASHION16_LOSSES = replace(
    FASHION16,
    name="fashion16-losses",
    title="Fashion-MNIST 16x16: other losses and discriminators",
    base=CIFAR16.base,
    runs=(replace(CIFAR16.runs[0], milestones=_MILLION), *_LOSSES),
)

# The same on photographs, from a teacher trained anew by CIFAR16's command. There the discriminator at 64 pixels is far
# ahead, and goes on, beside what lacks one ingredient of it.
CIFAR16_LOSSES = replace(
    CIFAR16,
    name="cifar16-losses",
    title="CIFAR-10 16x16 (from a JPEG copy): other losses and discriminators",
    runs=(
        replace(CIFAR16.runs[0], milestones=_EARLY),
        *(replace(run, milestones=_LONG, seeds=2) if run.name == "at-64" else run for run in _LOSSES),
        *(
            replace(
                run,
                name=f"{run.name}-at-64",
                title=f"{run.title}, discriminator at 64",
                flags={**run.flags, **_AT_64},
                milestones=_EARLY,
                seeds=1,
            )
            for run in CIFAR16.runs
            if run.name in ("gdd", "random", "shuffled", "level-2", "level-3")
        ),
    ),
)

CIFAR32 = Study(
    name="cifar32",
    title="CIFAR-10 32x32, for a GPU",
    # lossless where the assets hold the original
    train=Source(("cifar-10-python.tar.gz", "cifar10-32x32.zip", f"{_JPEG}-train.zip")),
    test=Source(("cifar-10-python.tar.gz", "cifar10-32x32-test.zip", f"{_JPEG}-test.zip"), {"split": "test"}),
    teacher={
        "arch": "ncsnpp",
        "model_channels": 128,
        "channel_mult": (2, 2, 2),
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.13,
        "batch": 512,
        "batch_gpu": 256,
        "precision": "bf16",
        "duration_mimg": 2.0,
        "tick_kimg": 100,
        "checkpoint_ticks": 1,
    },
    preset="cifar10-uncond-gdd-i",
    # VGG-16 without batch norm is the one whose weights the assets hold
    base={
        "backbones": ("vgg16", "tf_efficientnet_lite0"),
        "backbone_weights": ("vgg16={assets}/vgg16-features-fp16.safetensors",),
        "batch_gpu": 64,
        "d_precision": "fp32",
        "r1_precision": "fp32",
        "tick_kimg": 10,
        "checkpoint_ticks": 1,
        "ema_halflife_mimg": 0.05,
    },
    runs=(
        Run("gdd-i", "GDD-I (level 1 frozen)", milestones=(20_000, 50_000, 200_000)),
        Run("gdd", "GDD (nothing frozen)", {"freeze": 0}, milestones=(20_000, 50_000, 200_000)),
        Run("random", "GAN from random weights", {"freeze": 0, "init": "random"}, (20_000, 50_000, 200_000)),
        Run(
            "d-bf16",
            "GDD-I, discriminator in bf16, R1 in TF32",
            {"d_precision": "bf16", "r1_precision": "tf32"},
            milestones=(20_000, 50_000, 200_000),
        ),
    ),
    features=("resnet56", "lite2", "inception", "pixels"),
)

STUDIES = {study.name: study for study in (CIFAR16, CIFAR16_LOSSES, FASHION16, FASHION16_LOSSES, CIFAR32)}
