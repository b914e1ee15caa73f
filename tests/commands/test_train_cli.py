"""`python -m gdd_fast.train` as a user meets it: errors before work, stopping, resuming, the report at the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import BATCH, tiny_flags, write_inputs

from gdd_fast.config import override, to_dict
from gdd_fast.distill import comparison, dry_run
from gdd_fast.distill.gdd import Distillation
from gdd_fast.distill.memory_forecast import Forecast, Kept
from gdd_fast.distill.run import distill
from gdd_fast.errors import CheckpointError
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.train import main, read
from gdd_fast.training import checkpoint, loggers, loop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)


def refused(capsys, *flags):
    """The one line that the command says before it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_without_data_or_teacher(capsys, tmp_path):
    paper = ("--preset", "cifar10-uncond-gdd-i", "--run-dir", tmp_path / "run")
    assert "--data" in refused(capsys, *paper)
    assert "--teacher" in refused(capsys, *paper, "--data", "x.zip")
    assert "x.zip" in refused(capsys, *paper, "--data", "x.zip", "--teacher", "t.pkl")
    assert "unknown preset" in refused(capsys, "--preset", "cifar10")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "no-such.pkl"}, "no-such.pkl"),
        ({"cond": True}, "labels"),
        ({"backbone_weights": ("tf_efficientnet_lite0=no.pt",)}, "no.pt"),
        ({"backbones": ("resnet50",)}, "resnet50"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "tpu"}, "--device"),
        ({"device": "meta"}, "--device"),
        ({"seed": 2**64}, "--seed must be from 0"),
        ({"head_width": 1e6}, "--head-width"),
        ({"batch_gpu": 3}, "--batch-gpu 3 does not divide"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run here"),
        ({"evaluate_images": 8, "evaluate_data": "no.zip"}, "no.zip"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_error_before_anything_is_written(inputs, tmp_path, capsys, settings, message):
    flags = tiny_flags(inputs, run_dir=tmp_path / "run", **settings)
    if "cond" in settings:
        flags = [flag for flag in flags if flag not in ("True",)]
    assert message in refused(capsys, *flags)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_teacher_that_is_broken(inputs, tmp_path, capsys, dry):
    """Found before the first step: a run of few steps would end as if nothing were wrong."""
    net = load_generator(inputs / "teacher")
    name, parameter = next(iter(net.named_parameters()))
    parameter.data.view(-1)[0] = float("nan")
    save_network(net, tmp_path / "broken")
    flags = [*tiny_flags(inputs, run_dir=tmp_path / "run", teacher=str(tmp_path / "broken")), *dry]
    assert f"has NaN or infinite values in {name}: use one of its earlier checkpoints" in refused(capsys, *flags)
    assert os.listdir(tmp_path) == ["broken"]


def test_a_teacher_of_other_images(inputs, tmp_path, capsys):
    write_inputs(tmp_path, label_dim=3)
    flags = tiny_flags(tmp_path, run_dir=tmp_path / "run")
    assert "has 3 classes" in refused(capsys, *flags)
    assert "16^2" in refused(capsys, *tiny_flags(inputs, run_dir=tmp_path / "run", data=small_images(tmp_path)))
    reference = {"evaluate_images": 8, "evaluate_data": small_images(tmp_path)}
    assert "--evaluate-data" in refused(capsys, *tiny_flags(inputs, run_dir=tmp_path / "run", **reference))


def small_images(folder):
    (folder / "small").mkdir(exist_ok=True)
    for i in range(4):
        Image.new("L", (8, 8), i).save(folder / "small" / f"{i}.png")
    return folder / "small"


def test_a_run_dir_that_is_a_file(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, *tiny_flags(inputs, run_dir=tmp_path / "file"))


def test_a_damaged_checkpoint_is_not_overwritten(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / loop.CHECKPOINT).write_bytes(b"not one")
    assert "cannot be read" in refused(capsys, *tiny_flags(inputs, run_dir=run))
    assert os.listdir(run) == [loop.CHECKPOINT] and (run / loop.CHECKPOINT).read_bytes() == b"not one"


def test_dry_run(inputs, tmp_path, capsys):
    main([*tiny_flags(inputs, run_dir=tmp_path / "run"), "--dry-run"])
    shown = capsys.readouterr().out
    config, _ = json.JSONDecoder().raw_decode(shown)
    assert config["run"]["batch"] == BATCH and config["loss"]["r1_gamma"] == 1e-4
    for line in ("24 images", "conv0", "skip", "frozen", "Discriminator: ", "Operators: torch"):
        assert line in shown
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["cifar10-uncond-gdd-i", "imagenet-64-gdd-i"])
def test_a_dry_run_of_a_preset_says_what_it_needs(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    main(["--preset", name, "--dry-run", "--batch", "64"])
    shown = capsys.readouterr().out
    config, end = json.JSONDecoder().raw_decode(shown)
    assert config["preset"] == name and config["run"]["batch"] == 64
    (everything,) = re.findall(r"^all +([\d,]+) +([\d,]+)", shown[end:], re.M)
    total, frozen = (int(number.replace(",", "")) for number in everything)
    assert 0 < frozen < total and "Discriminator: " in shown
    assert shown.rstrip().endswith("converted folder)") and "--data PATH" in shown and "--teacher PATH" in shown
    assert "GPU memory, forecast: " in shown
    found = Forecast({"weights": 10**9}, {"G": Kept(0, 10**9)})
    monkeypatch.setattr(dry_run, "forecast", lambda *_: found)  # it takes seconds
    main(["--preset", name, "--dry-run", "--data", "here"])
    assert "--data PATH" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "must be at least 0, not -3" in refused(capsys, "--preset", name, "--dry-run", "--workers=-3")


def test_a_run_with_report_and_the_same_command_again(inputs, tmp_path, capsys, monkeypatch):
    flags = tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=8e-6, evaluate_images=4)
    flags += ["--g-precision", "tf32", "--d-precision", "tf32"]
    monkeypatch.setattr(comparison, "PANEL_IMAGES", 4)
    arithmetic, measure = set(), comparison.generator_populations

    def measured(*arguments, **options):
        arithmetic.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        return measure(*arguments, **options)

    monkeypatch.setattr(comparison, "generator_populations", measured)
    main(flags)
    assert arithmetic == {("ieee", "ieee")}, "a report is of full fp32 whatever the run was"
    first = capsys.readouterr().out
    assert "distilled, 1 step" in first and f"One-step generator in {tmp_path / 'run'}" in first
    distances = json.loads((tmp_path / "run" / "report.json").read_text())["distances"]
    assert distances.keys() == {"teacher", "untrained", "distilled"}
    assert Image.open(tmp_path / "run" / "comparison.png").size[0] > 0
    assert load_generator(tmp_path / "run").img_resolution == 16

    monkeypatch.setattr(comparison, "write", lambda *_: pytest.fail("measured again"))
    main(flags)
    again = capsys.readouterr().out
    assert "is finished: 8 images" in again and first.strip() in again

    config_before = (tmp_path / "run" / "config.json").read_bytes()
    assert "generator.g_lr: 0.0001 -> 0.5" in refused(capsys, *flags, "--g-lr", "0.5")
    assert (tmp_path / "run" / "config.json").read_bytes() == config_before


def test_the_same_from_python(inputs, tmp_path):
    config = read(tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=8e-6, batch_gpu="auto")).config
    assert config.run.batch_gpu == "auto"
    result = distill(override(config, evaluate_images=0, duration_mimg=4e-6))
    assert (result.images, result.new_images, result.signal, result.distances) == (4, 4, 0, None)
    assert load_generator(result.generator).img_resolution == 16
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["batch_gpu"] == BATCH
    assert distill(config).new_images == 4
    with pytest.raises(CheckpointError, match="other settings"):
        distill(override(config, g_lr=0.5))


def start(flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "gdd_fast.train", *flags],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_command_resumes(inputs, tmp_path, number, capsys):
    flags = tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=1.0, tick_kimg=1.0)
    process = start(flags)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("events.*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # event files are opened just before the first iteration
        time.sleep(1)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "the same command resumes" in out and "Traceback" not in err
    images = checkpoint.load(tmp_path / "run" / loop.CHECKPOINT).values["images"]
    assert images > 0 and images % BATCH == 0
    main([*flags, "--duration-mimg", str((images + BATCH) / 1e6)])
    shown = capsys.readouterr()
    assert f"Resuming {tmp_path / 'run'} at {images:,}" in shown.out + shown.err
    assert checkpoint.load(tmp_path / "run" / loop.CHECKPOINT).values["images"] == images + BATCH


def test_the_largest_seed(inputs, tmp_path):
    main(tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=4e-6, seed=2**63 - 1))


@pytest.mark.parametrize(("precision", "arithmetic"), [("tf32", "tf32"), ("fp32", "ieee")])
def test_settings_of_torch_are_the_runs_own_and_put_back(inputs, tmp_path, monkeypatch, precision, arithmetic):
    def settings():
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark

    before, during, iteration = settings(), [], Distillation.iteration
    monkeypatch.setattr(Distillation, "iteration", lambda *args: (during.append(settings()), iteration(*args)))
    flags = tiny_flags(inputs, run_dir=tmp_path / "run", duration_mimg=4e-6)
    main([*flags, "--g-precision", precision, "--d-precision", precision])
    assert during == [(arithmetic, arithmetic, True)] and settings() == before


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ([], ("bf16", "bf16", "tf32")),
        (["--preset", "demo-gdd", "--d-precision", "fp32"], ("bf16", "fp32", "tf32")),
        (["--precision", "public"], ("bf16", "fp32", "fp32")),
        (["--device", "cpu"], ("fp32", "fp32", "fp32")),
        (["--g-precision", "tf32"], ("tf32", "bf16", "tf32")),  # which the recipe for CPUs could not be combined with
    ],
)
def test_recipes_for_cpus_are_taken_as_fast_on_a_gpu(monkeypatch, flags, precisions):
    def of(flags):
        config = read(flags).config
        return config.generator.g_precision, config.discriminator.d_precision, config.loss.r1_precision

    small = ["--teacher", "demo", "--data", "demo"]
    assert of(small) == ("fp32", "fp32", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert of(flags) == precisions and of([*small, *flags]) == precisions
    assert of(["--preset", "cifar10-uncond-gdd-i", "--data", "x.zip", "--teacher", "x.pkl"]) == ("bf16", "bf16", "tf32")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_goes_on_in_the_precision_that_it_was_begun_in_on_another_device(tmp_path, monkeypatch, gpu):
    flags = ["--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    begun = read(flags).config
    values = {"images": begun.total_images, "config": to_dict(begun), "contents": {}}
    checkpoint.save(tmp_path / "run" / loop.CHECKPOINT, {"net": {"weight": torch.zeros(1)}}, values)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not gpu)
    assert read(flags).config == begun
    elsewhere = read(["--run-dir", str(tmp_path / "other")]).config
    assert elsewhere.generator.g_precision != begun.generator.g_precision
    assert read([*flags, "--precision", "public"]).config.loss.r1_precision == "fp32"
