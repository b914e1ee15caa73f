"""A model of diffusers' becomes a one-step generator by one command, and leaves as a folder and a pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import FLAGS

pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
pytest.importorskip("diffusers")

from diffusers_teachers import UNETS, random_unet, write_ddpm

from gdd_fast.acceleration import accelerate, restore
from gdd_fast.config import AUTO, override, recipe_for
from gdd_fast.distill.freeze import freeze
from gdd_fast.distill.run import distill
from gdd_fast.errors import ConfigError
from gdd_fast.interop.diffusers import OneStepPipeline
from gdd_fast.models.files.load import load_generator
from gdd_fast.sampling.sampler import one_step
from gdd_fast.train import read, settings_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """ddpm/ and data.zip."""
    return write_ddpm(tmp_path)


def flags(folder: Path, *more: str) -> list[str]:
    return ["--teacher", str(folder / "ddpm"), "--data", str(folder / "data.zip"), *more]


def test_without_a_preset_the_settings_are_the_teachers(folder):
    config = read(flags(folder)).config
    assert config.preset == AUTO and config.run_dir == Path("runs/ddpm")
    said = settings_of(config)
    assert f"--g-lr {config.generator.g_lr}" in said and f"--batch {config.run.batch}" in said
    assert read(flags(folder, "--batch", "6", "--g-lr", "0.5")).config.run.batch == 6
    assert read(flags(folder, "--preset", "ffhq-64-gdd-i")).config.preset == "ffhq-64-gdd-i"
    assert read([]).config.preset == "demo"
    small, large = recipe_for(16, 10**6, 0), recipe_for(64, 3 * 10**8, 1000)
    assert not small.data.cond and large.data.cond and large.generator.g_lr < small.generator.g_lr
    assert recipe_for(256, 10**8, 0).discriminator.backbones != small.discriminator.backbones
    tiny = recipe_for(16, 180_000, 0).generator
    assert small.generator.freeze == 1 and tiny.freeze == 0 and tiny.g_lr < small.generator.g_lr
    assert recipe_for(16, 10**6, 0, predicts_noise=True).generator.g_lr < tiny.g_lr
    assert config.generator.velocity_kimg > 0 and config.generator.g_lr == tiny.g_lr  # DDPM's epsilon


def test_distilled_sampled_and_handed_on(folder):
    changes = {"run_dir": folder / "run", "sigma_init": 5.0, "freeze": 1, "velocity_kimg": 0}
    config = override(read(flags(folder)).config, **FLAGS, **changes)
    result = distill(config)
    assert result.images >= 20
    net = load_generator(folder / "run")
    assert net.sigma_init == 5.0 and net.dtype == torch.float32
    untrained = load_generator(folder / "ddpm")
    z = torch.randn(3, 1, 16, 16)
    images = one_step(net, z)
    assert not torch.allclose(images, one_step(untrained, z, sigma=5.0), atol=1e-3)
    frozen, trained = "model.mid_block.resnets.0.conv1.weight", "model.mid_block.resnets.0.norm1.weight"
    ours, theirs = net.state_dict(), untrained.state_dict()
    assert torch.equal(ours[frozen], theirs[frozen]) and not torch.equal(ours[trained], theirs[trained])

    pipe = OneStepPipeline.from_pretrained(folder / "run")
    pipe.save_pretrained(folder / "pipe")
    want = pipe(2, generator=torch.Generator().manual_seed(0), output_type="np").images
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import vision_libraries, torch, numpy\n"
        "from gdd_fast.interop.diffusers import OneStepPipeline\n"
        "pipe = OneStepPipeline.from_pretrained(sys.argv[3])\n"
        "images = pipe(2, generator=torch.Generator().manual_seed(0), output_type='np').images\n"
        "numpy.save(sys.argv[4], images)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, ROOT, ROOT / "tests", folder / "pipe", folder / "images.npy"], check=True
    )
    np.testing.assert_allclose(np.load(folder / "images.npy"), want, atol=1e-5)


def test_an_impossible_noise_level_is_refused_before_anything_is_written(folder):
    config = override(read(flags(folder)).config, **FLAGS, run_dir=folder / "run", sigma_init=1e4)
    with pytest.raises(ConfigError, match="sigma_init"):
        distill(config)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", UNETS)
def test_a_freeze_level_names_the_same_layers_in_every_architecture(name):
    unet = random_unet(name)
    trained = lambda: {n for n, p in unet.named_parameters() if p.requires_grad}
    sets = []
    for level in range(4):
        freeze(unet, level)
        sets.append(trained())
    everything = {n for n, _ in unet.named_parameters()}
    # a Fourier embedding's frequencies are a parameter of a bare U-Net, and never one of a wrapped one
    assert sets[0] == everything
    level1 = sets[0] - sets[1]
    assert level1 and all(n.split(".")[-2] in ("conv1", "conv2", "conv", "0", "Conv2d_0") for n in level1)
    assert all(".to_out." in n for n in level1 if n.split(".")[-2] == "0")
    assert {n for n in everything if ".conv1." in n or ".conv2." in n} <= level1
    assert sets[1] - sets[2] == {n for n in everything if any(f".to_{part}." in n for part in "qkv")}
    assert sets[2] - sets[3] == {n for n in everything if ".conv_shortcut." in n}
    assert any(n.startswith("conv_in") for n in sets[3]) and any(n.startswith("conv_out") for n in sets[3])


@pytest.mark.parametrize("name", ["plain", "adm", "score"])
def test_twenty_steps_accelerated_end_where_diffusers_own_end(name):
    """As close as float32 is to float64: no more than twice the distance that rounding alone makes."""

    def train(dtype: torch.dtype, fast: bool) -> torch.Tensor:
        unet = random_unet(name).to(dtype).train()
        freeze(unet, 1)
        if fast:
            accelerate(unet, report=True)
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 1e-3)
        generator = torch.Generator().manual_seed(1)
        classes = None if unet.class_embedding is None else torch.tensor([0, 1])
        for _ in range(20):
            x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
            unet(x, torch.tensor(7.0, dtype=dtype), classes).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        restore(unet)
        return torch.cat([p.detach().double().flatten() for p in parameters])

    exact = train(torch.float64, False)
    ours, theirs = (float((train(torch.float32, fast) - exact).norm()) for fast in (True, False))
    assert ours <= 2 * theirs + 1e-9


def test_the_index_of_a_pipeline_says_what_it_is(folder):
    OneStepPipeline.from_generator(load_generator(folder / "ddpm")).save_pretrained(folder / "pipe")
    index = json.loads((folder / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "OneStepPipeline"
