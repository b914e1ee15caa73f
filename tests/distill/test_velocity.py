"""A teacher that predicts noise learns to predict v before it is distilled, or by `pretrain --teacher` alone."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import ALONE, FLAGS

pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
pytest.importorskip("diffusers")

from diffusers import DDPMScheduler, UNet2DModel
from diffusers_teachers import write_ddpm

from gdd_fast import pretrain
from gdd_fast.config import override
from gdd_fast.data import write_edm_zip
from gdd_fast.distill import comparison, components, first_stage, pretraining
from gdd_fast.distill.memory_forecast import of_components, own_storages, saved_bytes
from gdd_fast.distill.pretraining import PretrainConfig, Pretraining
from gdd_fast.distill.run import distill, preflight
from gdd_fast.distill.velocity import velocity_loss, with_velocity
from gdd_fast.errors import BackendError, CheckpointError, ConfigError, DataError, GddFastError, WeightsError
from gdd_fast.models.edm import ddpmpp
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.train import read
from gdd_fast.training import checkpoint, compiled_losses, loggers, loop
from gdd_fast.training.run_lock import LOCK


@pytest.fixture
def folder(tmp_path) -> Path:
    """ddpm/, which predicts noise, and data.zip."""
    return write_ddpm(tmp_path)


def config_of(folder: Path, run_dir: str, **changes):
    asked = read(["--teacher", str(folder / "ddpm"), "--data", str(folder / "data.zip")]).config
    return override(asked, **{**FLAGS, "freeze": 1, "velocity_kimg": 0.04, "run_dir": folder / run_dir, **changes})


def test_the_loss_is_the_squared_error_of_v_at_the_times_of_the_schedule(folder):
    net = with_velocity(load_generator(folder / "ddpm"), "ddpm").eval()
    images, random = torch.rand(32, 1, 16, 16) * 2 - 1, torch.Generator().manual_seed(3)
    with torch.no_grad():
        loss = velocity_loss(net, images, None, random)
        random.manual_seed(3)
        times = torch.randint(1000, (32,), generator=random)
        noise = torch.randn(images.shape, generator=random)
        unet, scheduler = UNet2DModel.from_pretrained(folder / "ddpm" / "unet"), DDPMScheduler()
        predicted = unet(scheduler.add_noise(images, noise, times), times).sample
        want = (predicted - scheduler.get_velocity(images, noise, times)).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-3)


def test_a_distillation_begins_with_a_teacher_that_has_learnt_v(folder, capsys):
    assert distill(config_of(folder, "run")).images >= 20
    assert "learns to predict v for 40 images" in capsys.readouterr().out
    taught, student = load_generator(folder / "run" / "velocity" / "teacher"), load_generator(folder / "run")
    for net in (taught, student):
        assert not net.predicts_noise and net.sigma_init == 80
    frozen, trained = "model.mid_block.resnets.0.conv1.weight", "model.mid_block.resnets.0.norm1.weight"
    weights, teachers = student.state_dict(), load_generator(folder / "ddpm").state_dict()
    assert torch.equal(weights[frozen], taught.state_dict()[frozen])
    assert not torch.equal(weights[frozen], teachers[frozen])
    assert not torch.equal(weights[trained], taught.state_dict()[trained])
    assert distill(config_of(folder, "run")).new_images == 0


def test_what_the_stage_left_is_not_made_again_nor_asked_for(folder):
    """A distillation may go on with another batch, also before its first checkpoint, and without the stage's folder."""
    first = config_of(folder, "run", max_hours=1e-9)
    assert distill(first).exit_status == 75
    assert distill(override(first, max_hours=None)).exit_status == 0
    trained = (folder / "run" / "velocity" / "checkpoint.safetensors").stat().st_mtime_ns
    (folder / "run" / "checkpoint.safetensors").unlink()
    again = config_of(folder, "run", batch=8)
    assert distill(again).new_images >= 20
    assert (folder / "run" / "velocity" / "checkpoint.safetensors").stat().st_mtime_ns == trained
    shutil.rmtree(folder / "run" / "velocity")
    assert distill(override(again, duration_mimg=4e-5)).new_images
    assert not (folder / "run" / "velocity").exists() and not load_generator(folder / "run").predicts_noise


def test_without_the_stage_the_rates_are_lower_and_other_teachers_are_refused_it(folder):
    asked = ["--teacher", str(folder / "ddpm"), "--data", str(folder / "data.zip"), "--velocity-kimg"]
    assert read([*asked, "0"]).config.generator.g_lr < read([*asked, "3"]).config.generator.g_lr
    asked[1] = str(folder / "teacher")
    with pytest.raises(ConfigError, match=r"--velocity-kimg.*predicts noise"):
        preflight(override(read([*asked, "3"]).config, **FLAGS, run_dir=folder / "run"))


def test_stopped_before_and_between_its_stages_a_run_ends_as_if_it_had_not_been(folder):
    assert distill(config_of(folder, "stopped", max_hours=1e-9)).exit_status == 75
    assert not (folder / "stopped" / "checkpoint.safetensors").exists()
    assert distill(config_of(folder, "stopped", max_hours=1e-9)).exit_status == 75
    for name in ("stopped", "whole"):
        assert distill(config_of(folder, name)).exit_status == 0
    stopped, whole = (load_generator(folder / name).state_dict() for name in ("stopped", "whole"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_a_signal_in_the_last_save_of_the_first_stage_ends_the_run(folder, monkeypatch):
    write, killed = checkpoint.save, []

    def interrupted(path, sections, values):
        if values["images"] == 40 and not killed:
            killed.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, sections, values)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    result = distill(config_of(folder, "stopped"))
    assert (result.exit_status, result.images) == (143, 0) and killed[0].parent == folder / "stopped" / "velocity"
    assert not (folder / "stopped" / "checkpoint.safetensors").exists()
    trained = killed[0].stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=r"started with --velocity-kimg 0\.04, not 0\.08: give that again"):
        distill(config_of(folder, "stopped", velocity_kimg=0.08))
    result = distill(config_of(folder, "stopped", max_hours=1e-9))
    assert (result.exit_status, result.images) == (75, 4) and killed[0].stat().st_mtime_ns == trained


MEASURED = {"evaluate_images": 8, "evaluate_ticks": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate_images": 3, "evaluate_ticks": 1}, "--evaluate-images 3: fewer than the 4 processes"),
        ({"evaluate_images": 8, "evaluate_data": "one.zip"}, "--evaluate-data holds only one image"),
        ({"evaluate_metrics": "fid", "feature_weights": ("inception=none.pth",), **MEASURED}, r"none\.pth"),
        ({"evaluate_ref": ("none.npz",), **MEASURED}, r"none\.npz"),
        ({"log": "wandb"}, "--log wandb needs wandb"),
        ({"engine": "graph"}, "--engine graph needs CUDA"),
        ({"fsdp": True}, "--fsdp is for EDM's networks"),
        ({"batch": 6}, "--batch 6 cannot be divided equally among 4"),
    ],
)
def test_what_the_distillation_could_not_do_is_refused_before_the_first_stage(folder, monkeypatch, changes, words):
    """On the first of four processes, before they have met."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    write_edm_zip(folder / "one.zip", np.zeros((1, 1, 16, 16), np.uint8), None)
    files = {name: str(folder / value) for name, value in changes.items() if name == "evaluate_data"}
    with pytest.raises(GddFastError, match=words):
        distill(config_of(folder, "run", **{"evaluate_metrics": "fd@pixels", **changes, **files}))
    assert not list((folder / "run").glob("*"))


def test_a_damaged_image_to_evaluate_with_is_found_before_the_first_stage(folder):
    write_edm_zip(folder / "real.zip", np.zeros((300, 1, 16, 16), np.uint8), None)
    with zipfile.ZipFile(folder / "real.zip") as whole, zipfile.ZipFile(folder / "damaged.zip", "w") as damaged:
        for place, name in enumerate(whole.namelist()):
            content = whole.read(name)
            damaged.writestr(name, content[:-30] if place == 1 else content)  # no image that the digest takes
    with pytest.raises(DataError, match=r"damaged\.zip: 00000/img00000001\.png"):
        distill(config_of(folder, "run", evaluate_images=8, evaluate_data=str(folder / "damaged.zip")))
    assert not (folder / "run").exists()


def test_the_run_owns_the_folder_of_its_first_stage(folder, monkeypatch):
    script = "import sys\nfrom gdd_fast.pretrain import main\nmain(sys.argv[1:])"
    flags = ["--data", folder / "data.zip", "--run-dir", folder / "run" / "velocity", "--device", "cpu"]
    said = []

    def try_to_pretrain(*_) -> None:
        told = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True)
        said.append((told.returncode, told.stderr.splitlines()[-1]))

    monkeypatch.setattr(comparison, "begin", try_to_pretrain)  # the second stage, when the first has ended
    distill(config_of(folder, "run"))
    assert said[0][0] == 2 and f"another process is training in {folder / 'run' / 'velocity'}" in said[0][1]
    assert not (folder / "run" / "velocity" / LOCK).exists()


def test_a_compiler_that_is_not_there_is_missed_before_the_first_stage(folder, monkeypatch):
    def missing(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled_losses, "COMPILER", missing)
    with pytest.raises(BackendError, match=r"--engine compile: torch\.compile fails at the trial step"):
        distill(config_of(folder, "run", engine="compile"))
    assert not (folder / "run" / "velocity").exists()


def test_a_file_in_the_place_of_a_folder_is_found_before_the_first_stage(folder):
    (folder / "run").mkdir()
    (folder / "run" / "generator_ema").write_text("")
    with pytest.raises(ConfigError, match="generator_ema is a file"):
        distill(config_of(folder, "run"))
    assert not (folder / "run" / "velocity").exists()


def test_the_first_stage_is_announced_and_can_be_left_out(folder):
    from gdd_fast.distill.dry_run import describe

    asked = config_of(folder, "run")
    assert "First: the teacher, which predicts noise, learns to predict v" in describe(asked, preflight(asked))
    without = override(asked, velocity_kimg=0)
    assert "First:" not in describe(without, preflight(without))


def test_data_and_backbones_are_read_once_for_both_stages(folder, monkeypatch):
    counted = Counter()

    def count(place, name):
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **options: counted.update([name]) or function(*args, **options))

    for place, name in ((components, "load_data"), (pretraining, "load_data"), (components, "build_features")):
        count(place, name)
    assert distill(config_of(folder, "run", evaluate_images=0)).images >= 20
    assert counted == {"load_data": 1, "build_features": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forecast_of_memory_is_of_the_stage_that_needs_more(folder, precision):
    config = config_of(folder, "run", batch=6, g_precision=precision)
    parts = preflight(config)
    found = of_components(config, parts)
    task = pretraining.Pretraining(first_stage.settings(config, parts.generator), ALONE, parts.dataset)
    plain = with_velocity(load_generator(folder / "ddpm"), "ddpm")
    plain.dtype = task.net.dtype
    images = torch.rand(6, 1, 16, 16) * 2 - 1

    def kept(net):
        return saved_bytes(lambda: velocity_loss(net, images, None, torch.Generator()).sum(), own_storages(net))

    assert found.first.steps["v"].bytes(6) == pytest.approx(kept(plain), rel=0.02)
    assert 0 < kept(task.net) <= found.first.steps["v"].bytes(6)
    task.iteration(0)
    moments = [t for state in task.optimizer.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    assert found.first.fixed["optimizer"] == sum(t.numel() * t.itemsize for t in moments)
    assert found.bytes(6) == max(found.first.bytes(6), replace(found, first=None).bytes(6))
    assert of_components(override(config, velocity_kimg=0), parts).first is None


def test_pretrain_goes_on_from_a_teacher(folder):
    data, out = str(folder / "data.zip"), folder / "pretrained"
    asked = ["--teacher", str(folder / "ddpm"), "--data", data, "--run-dir", str(out), "--batch", "8"]
    pretrain.main([*asked, "--no-x-flip", "--duration-mimg", "0.00004", "--workers", "0", "--device", "cpu"])
    net = load_generator(out / "teacher")
    assert not net.predicts_noise
    with pytest.raises(WeightsError, match=r"is a pretraining run: give its network folder, .*pretrained/teacher"):
        load_generator(out)
    stored = loop.stored_values(out)
    with pytest.raises(CheckpointError, match="with another --teacher"):  # none
        loop.check_same_run(out, stored["config"], {"data": stored["contents"]["data"]}, 80)
    assert not torch.equal(net.model.conv_in.weight, load_generator(folder / "ddpm").model.conv_in.weight)


def test_pretraining_goes_on_from_no_broken_teacher(folder):
    unet = UNet2DModel.from_pretrained(folder / "ddpm" / "unet")
    unet.conv_in.bias.data[0] = float("nan")
    unet.save_pretrained(folder / "ddpm" / "unet")
    asked = PretrainConfig(teacher=str(folder / "ddpm"), data=str(folder / "data.zip"), run_dir=folder / "pretrained")
    with pytest.raises(WeightsError, match=r"ddpm has NaN or infinite values in model\.conv_in\.bias"):
        Pretraining(asked, ALONE)


def test_a_network_of_another_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match="mine cannot learn to predict v"):
        with_velocity(EDMPrecond(16, 1, 0, **ddpmpp(model_channels=8, channel_mult=[1])), "mine")
