"""Every training case of the benchmarks runs, on a CPU and small: the sizes that are measured need a GPU."""

import math
from dataclasses import dataclass

import pytest
import torch

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.cases.training_cases import settings_for, training_case
from benchmarks.harness.case import Effort, measure_case
from benchmarks.peers.training import Batch, Setup, Training
from gdd_fast.config import PRESETS, TrainConfig, override
from gdd_fast.models.backbones import deit

CPU = torch.device("cpu")
SMALL = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}


@dataclass(frozen=True)
class SmallSetup(Setup):
    """A preset with all of its layers' kinds: whole backbones on small images, thin G and heads."""

    @property
    def config(self) -> TrainConfig:
        preset = PRESETS[self.preset]
        with_deit = "deit_base_distilled_patch16_224" in preset.discriminator.backbones
        return override(preset, disc_resolution=224 if with_deit else 32, head_width=0.125)


@pytest.fixture
def small_networks(monkeypatch):
    """Generators, and DeiT, which takes images of one size only, thinner; VGG and EfficientNet-lite0 are whole."""
    monkeypatch.setattr(deit, "_WIDTH", 96)
    monkeypatch.setattr(deit.DeitBase, "tap_channels", (96,) * 4)
    for name, (_, arguments) in NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, (16, {**arguments, **SMALL}))


def kinds():
    """A preset of every kind that differs in its networks, and one that freezes nothing."""
    found = {(c.discriminator.backbones, c.data.cond): name for name, c in PRESETS.items() if c.generator.freeze}
    return [*found.values(), "cifar10-uncond-gdd"]


@pytest.mark.parametrize("preset", kinds())
def test_steps_of_every_kind_of_preset_run_under_all_settings(preset, small_networks):
    """An iteration is what the cases of single steps consist of. In float32 all settings have equal gradients."""
    norms = {}
    for name, settings in settings_for(CPU).items():
        training = Training(SmallSetup(preset, 2), settings, CPU)
        batch = Batch.draw(training)
        found = {step: training.step(step, batch) for step in ("G", "D", "R1")}
        norms[name] = {step: torch.nn.utils.get_total_norm(gradients).item() for step, gradients in found.items()}
        assert all(0 < norm < math.inf for norm in norms[name].values())
    # of the first step alone: Adam turns what rounding left of the later ones
    assert norms["stock"]["G"] == pytest.approx(norms["official"]["G"], rel=0.3)
    assert norms["gdd_fast"]["G"] == pytest.approx(norms["official"]["G"], rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cifar10-uncond-gdd-i", "demo"])
def test_a_training_case_is_measured(preset, small_networks):
    case = training_case("iteration", SmallSetup(preset, 8))
    rows = list(measure_case(case, CPU, Effort(0.0)))
    assert [(row.peer, row.failure) for row in rows] == [(peer, None) for peer in ("official", "stock", "gdd_fast")]


class LargeImages(SmallSetup):
    @property
    def config(self) -> TrainConfig:
        return override(super().config, disc_resolution=224, backbones=("tf_efficientnet_lite0",))


@pytest.mark.slow
def test_a_case_of_few_images_is_measured_although_bf16_leaves_nothing_of_a_gradient(small_networks):
    """EfficientNet-lite0 at 224x224: plain PyTorch's gradient of the images is as far from float32's as its norm."""
    case = training_case("iteration", LargeImages("cifar10-uncond-gdd-i", 2))
    rows = list(measure_case(case, CPU, Effort(0.0)))
    assert [(row.peer, row.failure) for row in rows] == [(peer, None) for peer in ("official", "stock", "gdd_fast")]
