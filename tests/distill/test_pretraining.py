"""EDM's denoising loss, and a pretraining run that repeats, resumes, and makes what `train --teacher` takes."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_run import ALONE
from torch import nn

from gdd_fast.config import to_dict
from gdd_fast.distill.pretraining import TEACHER, PretrainConfig, Pretraining, denoising_loss
from gdd_fast.errors import ConfigError
from gdd_fast.models.files.load import as_generator, load_generator
from gdd_fast.pretrain import main
from gdd_fast.training import loop

pytestmark = pytest.mark.usefixtures("plain")


def config_of(inputs, run_dir, **settings):
    return PretrainConfig(
        data=str(inputs / "data.zip"), run_dir=run_dir, model_channels=8, num_blocks=1, batch=4, device="cpu",
        **{"duration_mimg": 40e-6, "tick_kimg": 0.02, "lr_rampup_kimg": 0.02, **settings},
    )  # fmt: skip


def train(config, iterations=None):
    task = Pretraining(config, ALONE)
    total = 4 * iterations if iterations else round(config.duration_mimg * 1e6)
    loop.run(task, config.run_dir, to_dict(config), loop.Schedule(total, 20, 20), ALONE)
    return task


def same(a, b):
    pairs = zip(a.state()[0].items(), b.state()[0].items(), strict=True)
    return all(torch.equal(t, other[key]) for (_, part), (_, other) in pairs for key, t in part.items())


class Denoiser(nn.Module):
    """Answers half of what it is shown, and remembers it."""

    def forward(self, x, sigma, labels):
        self.x, self.sigma = x, sigma
        return x / 2


def test_the_denoising_loss():
    net, images = Denoiser(), torch.randn(5, 1, 4, 4)
    losses = denoising_loss(net, images, None, torch.Generator().manual_seed(0))
    for i in range(5):
        sigma = net.sigma[i].item()
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        expected = weight * (net.x[i] / 2 - images[i]).square().sum().item()
        assert losses[i].item() == pytest.approx(expected, rel=1e-4)


def test_noise_levels_are_log_normal_and_noise_is_of_that_level():
    net, images = Denoiser(), torch.zeros(4000, 1, 4, 4)
    denoising_loss(net, images, None, torch.Generator().manual_seed(0))
    logs = net.sigma.flatten().log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.08) and logs.std().item() == pytest.approx(1.2, abs=0.06)
    assert (net.x / net.sigma).std().item() == pytest.approx(1, abs=0.02)


def test_the_learning_rate_rises_from_zero(inputs, tmp_path):
    task = Pretraining(config_of(inputs, tmp_path), ALONE)
    rates = []
    for number in range(8):
        task.iteration(number * 4)
        rates.append(task.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * min(1, number * 4 / 20) for number in range(8)])
    assert task.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(inputs, tmp_path, dropout):
    whole = train(config_of(inputs, tmp_path / "whole", dropout=dropout), 10)
    torch.rand(3)  # whatever else draws from torch's own generator
    train(config_of(inputs, tmp_path / "run", dropout=dropout), 4)
    resumed = train(config_of(inputs, tmp_path / "run", dropout=dropout), 10)
    assert same(whole, resumed)


def test_micro_batches_add_up(inputs, tmp_path, monkeypatch):
    """The same noise for each image, as a micro-batch draws its own."""
    from gdd_fast.distill import pretraining

    def fixed(net, images, labels, random):
        return (net(images, torch.full((len(images),), 0.5), labels) - images).square().sum(dim=(1, 2, 3))

    monkeypatch.setattr(pretraining, "denoising_loss", fixed)
    found = []
    for batch_gpu in (None, 1):
        task = Pretraining(config_of(inputs, tmp_path, batch_gpu=batch_gpu), ALONE)
        monkeypatch.setattr(task.guard, "step", lambda: torch.zeros(()))
        task.iteration(0)
        found.append(([p.grad for p in task.net.parameters()], task.averages.take()["loss"]))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-9)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_the_command_makes_a_teacher(inputs, tmp_path, capsys):
    config = config_of(inputs, tmp_path / "run")
    fields = dataclasses.asdict(config)
    flags = [
        part
        for name in ("data", "run_dir", "model_channels", "num_blocks", "batch", "device", "duration_mimg", "tick_kimg")
        for part in (f"--{name.replace('_', '-')}", str(fields[name]))
    ]
    main(flags)
    assert "Teacher after 40 images" in capsys.readouterr().out
    assert as_generator(load_generator(tmp_path / "run" / TEACHER)).img_resolution == 16
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    assert "skipped_steps" in (tmp_path / "run" / "report.html").read_text()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["images"] == 40 and line["skipped_steps"] == 0 and math.isfinite(line["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1"),
        ({"batch_gpu": 3}, "--batch-gpu 3 does not divide"),
        ({"dropout": 1.0}, "--dropout"),
        ({"lr": float("nan")}, "--lr must be finite"),
        ({"arch": "unet"}, "--arch must be one of"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed must be from 0 to 9223372036854775807"),
    ],
)
def test_settings_that_cannot_work(inputs, tmp_path, settings, message):
    config = dataclasses.replace(config_of(inputs, tmp_path), **settings)
    with pytest.raises(ConfigError, match=message):
        Pretraining(config, ALONE)
