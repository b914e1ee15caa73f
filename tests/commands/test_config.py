"""Presets, and what is wrong with a configuration before anything is read."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from gdd_fast.config import (
    PRESETS,
    RESUMABLE,
    default_settings,
    differences,
    override,
    preset,
    to_dict,
)
from gdd_fast.errors import ConfigError

VGG = ("vgg16_bn", "tf_efficientnet_lite0")
DEIT = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
# backbones, batch, lr of G and D, half-life and length in millions of images, classes
TABLE = {
    "cifar10-uncond": (VGG, 256, 1e-4, 1e-4, 0.5, 5, False),
    "cifar10-cond": (VGG, 256, 1e-4, 1e-4, 0.5, 5, True),
    "afhqv2-64": (DEIT, 256, 2e-5, 4e-5, 0.5, 10, False),
    "ffhq-64": (DEIT, 256, 2e-5, 4e-5, 0.5, 10, False),
    "imagenet-64": (DEIT, 512, 8e-6, 4e-5, 50, 10, True),
}
PAPER = [(name + suffix, row, level) for name, row in TABLE.items() for suffix, level in (("-gdd", 0), ("-gdd-i", 1))]


@pytest.mark.parametrize(("name", "row", "level"), PAPER, ids=[name for name, _, _ in PAPER])
def test_the_papers_recipes(name, row, level):
    config = preset(name)
    backbones, batch, g_lr, d_lr, halflife, duration, cond = row
    assert config.preset == name and config.run_dir == Path("runs") / name
    assert config.discriminator.backbones == backbones and config.discriminator.disc_resolution == 224
    assert config.discriminator.head_width == 1 and config.discriminator.class_embedding == "imagenet"
    assert (config.run.batch, config.generator.g_lr, config.discriminator.d_lr) == (batch, g_lr, d_lr)
    assert (config.generator.ema_halflife_mimg, config.generator.ema_rampup) == (halflife, 0.05)
    assert config.run.duration_mimg == duration and config.total_images == duration * 10**6
    assert config.generator.freeze == level
    assert config.data.cond is cond and config.data.x_flip is False
    assert (config.loss.r1_gamma, config.loss.r1_interval, config.loss.logit_reduction) == (1e-4, 16, "rows")
    assert (config.generator.g_precision, config.discriminator.d_precision) == ("bf16", "bf16")
    assert config.data.data is None and config.generator.teacher is None


def test_there_are_ten_of_them_and_two_demos():
    assert set(PRESETS) == {name for name, _, _ in PAPER} | {"demo", "demo-gdd"}
    for name, level in (("demo", 1), ("demo-gdd", 0)):
        PRESETS[name].validate()
        assert PRESETS[name].generator.freeze == level
    assert differences(to_dict(PRESETS["demo"]), to_dict(PRESETS["demo-gdd"])) == ["generator.freeze: 1 -> 0"]


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"cifar10-uncond-gdd-i"):
        preset("cifar")


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_is_plain_json(name):
    settings = to_dict(changed(preset(name), run_dir=Path("a/b"), backbone_weights=("vgg16=x.pt",), batch_gpu=8))
    assert json.loads(json.dumps(settings)) == settings
    assert settings["run"]["run_dir"] == "a/b" and settings["discriminator"]["backbone_weights"] == ["vgg16=x.pt"]


def changed(config, **settings):
    """`settings` by flag name."""
    for section in ("data", "generator", "discriminator", "loss", "run"):
        part = getattr(config, section)
        ours = {k: v for k, v in settings.items() if k in {f.name for f in dataclasses.fields(part)}}
        config = dataclasses.replace(config, **{section: dataclasses.replace(part, **ours)})
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": None}, "--data"),
        ({"teacher": None}, "--teacher"),
        ({"freeze": 4}, "--freeze"),
        ({"batch": 1}, "--batch must be at least 2"),
        ({"batch_gpu": 0}, "--batch-gpu"),
        ({"duration_mimg": 0.0}, "--duration-mimg"),
        ({"duration_mimg": 1e-9}, "--duration-mimg"),
        ({"duration_mimg": math.inf}, "--duration-mimg must be finite"),
        ({"tick_kimg": -1.0}, "--tick-kimg"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed must be from 0 to 9223372036854775807"),
        ({"head_width": 0.0}, "--head-width"),
        ({"head_width": 1e6}, "--head-width must be positive and at most 16"),
        ({"disc_resolution": 10**8}, "--disc-resolution"),
        ({"checkpoint_ticks": 0}, "--checkpoint-ticks"),
        ({"max_skipped_steps": 0}, "--max-skipped-steps must be at least 1"),
        ({"max_hours": 0.0}, "--max-hours must be above 0"),
        ({"sigma_init": -80.0}, "--sigma-init must be above 0"),
        ({"evaluate_images": 1}, "covariance"),
        ({"workers": -1}, "--workers"),
        ({"data_memory_gib": -1.0}, "--data-memory-gib"),
        ({"g_lr": -1e-4}, "--g-lr must be at least 0"),
        ({"g_lr": math.nan}, "--g-lr must be finite"),
        ({"ema_halflife_mimg": 0.0}, "--ema-halflife-mimg"),
        ({"ema_rampup": -1.0}, "--ema-rampup"),
        ({"r1_interval": -1}, "--r1-interval"),
        ({"backbones": ()}, "--backbones"),
        ({"backbones": ("vgg16", "vgg16")}, "twice"),
        ({"backbone_weights": ("vgg16.pt",)}, "name=path"),
        ({"backbone_weights": ("vgg16=x.pt",)}, "not among --backbones"),
        ({"g_precision": "fp8"}, "--g-precision must be one of fp32, tf32, bf16"),
        ({"logit_reduction": "sum"}, "--logit-reduction"),
        ({"backend": "numpy"}, "--backend"),
        ({"g_precision": "tf32", "d_precision": "fp32"}, "cannot be mixed"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        changed(preset("demo"), **settings).validate()


def test_override_is_by_the_names_of_the_flags():
    changed = override(preset("demo"), g_lr=0.5, disc_resolution=96, run_dir=Path("elsewhere"))
    assert (changed.generator.g_lr, changed.discriminator.disc_resolution) == (0.5, 96)
    assert changed.run_dir == Path("elsewhere") and changed.data == preset("demo").data
    with pytest.raises(ConfigError, match="no setting 'learning_rate'"):
        override(preset("demo"), learning_rate=1.0)


def test_what_a_resumed_run_may_change():
    old = to_dict(preset("demo"))
    length = changed(preset("demo"), duration_mimg=9.0, run_dir=Path("elsewhere"), device="cpu", teacher="moved")
    assert differences(old, to_dict(length)) == []
    recipe = changed(preset("demo"), batch=8, g_lr=0.5)
    assert [line.split(":")[0] for line in differences(old, to_dict(recipe))] == ["generator.g_lr", "run.batch"]


def test_a_setting_added_tomorrow_is_at_its_default_in_runs_of_yesterday():
    now = preset("demo")
    defaults = default_settings(now)
    for section in defaults.keys() - {"preset"}:
        for name in defaults[section].keys() - RESUMABLE:
            yesterday = to_dict(now)
            value = yesterday[section].pop(name)
            other = {name: "other"}
            found = differences(yesterday, to_dict(now), defaults=defaults)
            assert found == (
                [] if value == defaults[section][name] else [f"{section}.{name}: {defaults[section][name]} -> {value}"]
            )
            chosen = to_dict(now)
            chosen[section] |= other
            assert len(differences(yesterday, chosen, defaults=defaults)) == 1
    yesterday = to_dict(now)
    del yesterday["loss"]
    assert all("loss" in line for line in differences(yesterday, to_dict(now), defaults=defaults))
