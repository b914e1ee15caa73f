"""Metrics during a run: when, of what, on how many ranks, the best generators, and what is refused before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import SIZE, tiny_config, tiny_flags, tiny_network, write_inputs

from gdd_fast.config import override
from gdd_fast.data import write_edm_zip
from gdd_fast.distill import comparison
from gdd_fast.distill.measuring import Evaluation, build_measurement, read_best
from gdd_fast.distill.run import distill, preflight
from gdd_fast.errors import ConfigError, DataError, WeightsError
from gdd_fast.evaluate import EvaluateConfig, evaluate
from gdd_fast.metrics.measure import Measurement, parse_metrics
from gdd_fast.metrics.shared_judges import backbones_of, shared_judges
from gdd_fast.ranks import World
from gdd_fast.training import loggers

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "duration_mimg": 16e-6,
    "evaluate_images": 7,
    "evaluate_ticks": 2,
    "evaluate_metrics": "fd@pixels,pr@pixels",
    "log": "none",
}
KEYS = {"fd-pixels-16", "precision-pixels-16", "recall-pixels-16", "f1-pixels-16"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with inputs and a run of four ticks that measures at the start and at every second one."""
    folder = tmp_path_factory.mktemp("measured")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "FEATURES", ("pixels",))
        patch.setattr(comparison, "PANEL_IMAGES", 4)
        distill(tiny_config(folder, **SETTINGS, evaluate_at_start=True, tick_kimg=0.004))
    return folder


def lines(folder):
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["images"]: line for line in found}


def test_every_second_tick_and_the_teacher_first(measured):
    found = lines(measured)
    assert list(found) == [0, 4, 8, 12, 16]
    for images, line in found.items():
        assert (line.keys() >= KEYS) == (images in (0, 8, 16)), images
    assert {f"teacher_{key}" for key in KEYS} <= found[0].keys()
    assert not any(key.startswith("teacher_") for key in found[8])
    assert (measured / "run" / "samples" / "000000000.png").is_file()


def test_the_last_value_is_that_of_the_command(measured):
    asked = EvaluateConfig(
        net=str(measured / "run"),
        data=str(measured / "data.zip"),
        metrics="fd@pixels,pr@pixels",
        images=7,
        device="cpu",
    )
    values = evaluate(asked)["metrics"]
    assert {key: lines(measured)[16][key] for key in KEYS} == pytest.approx(values, rel=1e-4, abs=1e-6)


def test_the_best_generator_of_each_value_is_kept(measured):
    best, found = read_best(measured / "run"), lines(measured)
    assert best.keys() == KEYS
    for key, kept in best.items():
        values = {images: found[images][key] for images in (8, 16)}
        better = min if key.startswith("fd") else max
        assert kept["value"] == better(values.values()) == values[kept["images"]]
    asked = EvaluateConfig(
        net=str(measured / "run" / "best" / "fd-pixels-16"),
        data=str(measured / "data.zip"),
        metrics="fd@pixels",
        images=7,
        device="cpu",
    )
    assert evaluate(asked)["metrics"]["fd-pixels-16"] == pytest.approx(best["fd-pixels-16"]["value"], rel=1e-4)


def test_a_worse_value_or_none_replaces_nothing(measured, tmp_path):
    config = override(tiny_config(measured, **SETTINGS), run_dir=tmp_path)
    evaluation = Evaluation(config, Measurement(parse_metrics("fd@pixels")), World(0, 1, torch.device("cpu")))
    for images, value in ((8, 5.0), (16, 6.0), (24, float("nan")), (32, 4.0)):
        evaluation._keep_best(tiny_network(), images, {"fd-pixels-16": value, "kid_std": value})
    assert read_best(tmp_path) == {"fd-pixels-16": {"value": 4.0, "images": 32, "metric": "FD-pixels-16"}}


def _rank(rank: int, folder, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = tiny_config(folder, **SETTINGS)
    measurement = Measurement(parse_metrics("fd@pixels,pr@pixels,kid@pixels"))
    evaluation = Evaluation(config, measurement, World(rank, 2, torch.device("cpu")))
    results.put(evaluation._measure(tiny_network().eval(), comparison.ONE_STEP))
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_does(measured, tmp_path):
    """Seven images on two ranks: one has a share more. KID sees the order of the images too."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (measured, str(tmp_path / "store"), results), nprocs=2)
    together = [values for values in (results.get(), results.get()) if values]
    alone = Evaluation(
        tiny_config(measured, **SETTINGS),
        Measurement(parse_metrics("fd@pixels,pr@pixels,kid@pixels")),
        World(0, 1, torch.device("cpu")),
    )._measure(tiny_network().eval(), comparison.ONE_STEP)
    assert len(together) == 1, "the main rank alone computes"
    assert together[0] == pytest.approx(alone, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_a_whole_run_under_torchrun_measures_and_keeps_what_one_process_finds(tmp_path):
    """Two processes: start, ticks, the best generators, the page; and the command alone finds the last values again."""
    write_inputs(tmp_path)
    metrics, images = "fd@pixels,pr@pixels,kid@pixels,fd@lite0", 9
    flags = [
        *tiny_flags(tmp_path, duration_mimg=16e-6, evaluate_images=images, evaluate_ticks=1, evaluate_metrics=metrics),
        "--evaluate-at-start",
    ]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [*start, "-m", "gdd_fast.train", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("One-step generator in") == 1
    keys = KEYS | {"kid-pixels-16", "kid_std-pixels-16", "fd-lite0-64"}
    found = lines(tmp_path)
    assert list(found) == [0, 8, 16] and all(line.keys() >= keys for line in found.values())
    assert {f"teacher_{key}" for key in keys} <= found[0].keys()
    best = read_best(tmp_path / "run")
    assert best.keys() == {key for key in keys if "_std" not in key}
    for key, kept in best.items():
        better = min if key.startswith(("fd", "kid")) else max
        assert kept["value"] == better(found[8][key], found[16][key])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "fd-lite0-64" in page and "teacher_recall-pixels-16" in page
    data = str(tmp_path / "data.zip")
    asked = EvaluateConfig(net=str(tmp_path / "run"), data=data, metrics=metrics, images=images, device="cpu")
    assert {key: found[16][key] for key in keys} == pytest.approx(evaluate(asked)["metrics"], rel=1e-4, abs=1e-6)


def test_what_cannot_be_measured_is_refused_before_anything_is_written(measured, tmp_path, monkeypatch):
    config = override(tiny_config(measured, **SETTINGS), run_dir=tmp_path / "new")
    big = np.zeros((4, 1, 2 * SIZE, 2 * SIZE), np.uint8)
    write_edm_zip(tmp_path / "big.zip", big)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(SIZE**2), sigma=-np.eye(SIZE**2))
    monkeypatch.delenv("GDD_FAST_WEIGHTS", raising=False)
    for settings, kind, message in (
        ({"evaluate_metrics": "fdi"}, ConfigError, "fdi"),
        ({"evaluate_metrics": "nn"}, ConfigError, "nn"),
        ({"evaluate_metrics": "fd@vgg16", "feature_weights": ("vgg16=nowhere.pth",)}, WeightsError, "nowhere.pth"),
        ({"evaluate_ref": (str(tmp_path / "bad.npz"),)}, DataError, "not a covariance"),
        ({"evaluate_data": str(tmp_path / "big.zip")}, ConfigError, "32"),
        ({"evaluate_images": 0}, ConfigError, "--evaluate-images"),
        ({"evaluate_images": 3}, ConfigError, "pr needs at least 4 generated images, not 3"),
        ({"log": "excel"}, ConfigError, "excel"),
    ):
        with pytest.raises(kind, match=message):
            preflight(override(config, **settings))
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        preflight(override(config, log="wandb"))
    assert not (tmp_path / "new").exists()


def test_a_judge_that_the_discriminator_looks_through_is_named(measured):
    config = tiny_config(measured, **{**SETTINGS, "evaluate_metrics": "fd@lite0,fd@pixels"})
    extractors = build_measurement(config, tiny_network()).extractors
    (line,) = shared_judges(config.discriminator.backbones, extractors)
    assert "lite0-64" in line
    run = measured / "run"
    for net in (run, run / "best" / "fd-pixels-16"):
        assert backbones_of(net) == list(config.discriminator.backbones)
    assert backbones_of(measured / "teacher") == []
    assert shared_judges(["vgg16_bn"], extractors) == []


WANDB = """
import pathlib, sys
from gdd_fast.training.loggers import open_loggers
(logger,) = open_loggers(("wandb",), pathlib.Path(sys.argv[1]), 0, {"batch": 4}, print)
logger.add({"fid": 3.5}, 4)
logger.close()
"""


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path):
    """In a process of its own, as its service writes the last records while that ends."""
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], env=environment, check=True, capture_output=True)
    run = (tmp_path / loggers.WANDB_ID).read_text().strip()
    (written,) = tmp_path.glob(f"wandb/offline-run-*/run-{run}.wandb")
    assert b"fid" in written.read_bytes()
