"""The presets of the paper, the recipe for a teacher without a preset, and the two choices of precision.

Recipes: Zheng & Yang, "Diffusion Models Are Innate One-Step Generators" (arXiv 2405.20750) and its public code.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from gdd_fast.config.sections import (
    DEMO,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    RunConfig,
    TrainConfig,
)
from gdd_fast.errors import ConfigError

AUTO = "auto"  # the preset's name in a configuration made by recipe_for


def override(config: TrainConfig, **settings: Any) -> TrainConfig:
    """A copy of `config` with some settings changed, each named as its flag: `override(preset("demo"), g_lr=1e-4)`.

    Raises ConfigError for a setting that no section has, or a value of the wrong type.
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


_BY_TEACHER = {
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
        loss=LossConfig(reuse_fakes=True, r1_gamma=3e-3),
        run=RunConfig(
            duration_mimg=0.032,
            batch=16,
            lr_decay_kimg=5,
            tick_kimg=2,
            evaluate_images=2000,
            evaluate_data="demo-test",
        ),
    ),
}


def _freeze_variant(name: str, recipe: TrainConfig, level: int) -> TrainConfig:
    return replace(recipe, preset=name, generator=replace(recipe.generator, freeze=level))


def _presets() -> dict[str, TrainConfig]:
    presets = {}
    for name, recipe in _BY_TEACHER.items():
        for suffix, level in (("-gdd", 0), ("-gdd-i", 1)):
            if (name, suffix) == (DEMO, "-gdd-i"):
                suffix = ""  # the demo is GDD-I; `demo-gdd` shows what freezing gains
            presets[name + suffix] = _freeze_variant(name + suffix, recipe, level)
    return presets


PRESETS: dict[str, TrainConfig] = _presets()


VELOCITY_KIMG = 40.0


def recipe_for(
    resolution: int, parameters: int, classes: int, *, predicts_noise: bool = False, learns_velocity: bool = False
) -> TrainConfig:
    """The recipe for a teacher without a preset, based on the preset whose network is most similar.

    `resolution` in pixels; `parameters` and `classes` are counts. It is GDD-I, with the demo's settings for small
    networks, CIFAR-10's up to 32 pixels, FFHQ's above, and ImageNet's for networks of that size. Networks below half a
    million parameters get GDD and a lower learning rate: the demo's settings broke one. They also broke one that
    `predicts_noise`: such a network first learns to predict v or, if it cannot, gets a lower learning rate
    (docs/teachers.md). Data, teacher and evaluation data are left unset.
    """
    if parameters >= 150_000_000:
        like = "imagenet-64"
    elif resolution > 32:
        like = "ffhq-64"
    else:
        like = "cifar10-uncond" if parameters >= 10_000_000 else DEMO
    recipe = _freeze_variant(AUTO, _BY_TEACHER[like], 1)
    if like == DEMO:  # its small batches, decaying rates and reused images suit a run of minutes only
        recipe = override(recipe, lr_decay_kimg=20, batch=32, reuse_fakes=False, duration_mimg=0.036)
        recipe = override(recipe, disc_resolution=64)  # photographs need it: docs/study.md
    if parameters < 500_000:
        recipe = override(recipe, freeze=0, g_lr=3e-4)
    if learns_velocity:
        recipe = override(recipe, velocity_kimg=VELOCITY_KIMG)
    elif predicts_noise:
        recipe = override(recipe, g_lr=min(recipe.generator.g_lr, 1e-4))
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
        "reuse_fakes": False,
        "nonfinite": "replace",
        "logit_reduction": "rows",
    },
}
"""What `--precision` sets, by flag (docs/precision.md). The presets are `fast`, except the demo's, which are fp32."""


def preset(name: str, precision: str | None = None) -> TrainConfig:
    """The named preset, with the settings of `RECIPES[precision]` if that is given.

    Raises a `ConfigError` that lists the valid names if either is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name] if precision is None else in_precision(PRESETS[name], precision)


def in_precision(config: TrainConfig, precision: str) -> TrainConfig:
    """`config` with the settings of `RECIPES[precision]`. Raises `ConfigError` for an unknown name."""
    if precision not in RECIPES:
        raise ConfigError(f"--precision must be one of {', '.join(RECIPES)}, not {precision!r}")
    return override(config, **RECIPES[precision])
