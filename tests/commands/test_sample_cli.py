"""`python -m gdd_fast.sample`: what it writes, and what it refuses before it starts."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gdd_fast.data.dataset import open_dataset
from gdd_fast.models.files.load import RUN_GENERATOR, load_network
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond, GDDPrecond
from gdd_fast.sample import main
from gdd_fast.sampling.generate import launch
from gdd_fast.sampling.resume import part_folder, reserve
from gdd_fast.sampling.sampler import heun, one_step
from gdd_fast.sampling.seeds import latents


def tiny(cls=EDMPrecond, label_dim: int = 0, channels: int = 1):
    torch.manual_seed(0)
    net = cls(
        8,
        channels,
        label_dim,
        model_type="SongUNet",
        model_channels=16,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
    )
    with torch.no_grad():  # fresh networks end in zeros, and all their images would be alike
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("net")
    save_network(tiny(), path)
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("conditional")
    save_network(tiny(label_dim=5), path)
    return path


def sample(*args) -> None:
    main([str(arg) for arg in (*args, "--device", "cpu")])


def expected(x: torch.Tensor) -> np.ndarray:
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def npz_images(path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"]


@torch.no_grad()
def test_one_step_images_by_seed(folder, tmp_path, capsys):
    sample(
        "--net",
        folder,
        "--seeds",
        "3-6,1000",
        "--out",
        tmp_path / "out.zip",
        "--grid",
        tmp_path / "g.png",
        "--batch",
        2,
    )
    net = load_network(folder)
    images = expected(one_step(net, latents([3, 4, 5, 6, 1000], (1, 8, 8))[0]))
    dataset = open_dataset(tmp_path / "out.zip")
    assert len(dataset) == 5
    for i in range(5):
        # One grey level: convolutions round differently in batches of another size.
        assert np.abs(dataset.image(i).astype(int) - images[i].transpose(2, 0, 1)).max() <= 1
    assert Image.open(tmp_path / "g.png").size == (3 * 66 + 2, 2 * 66 + 2)
    assert "5 images in" in capsys.readouterr().out


@torch.no_grad()
def test_many_steps_of_a_teacher(folder, tmp_path):
    sample("--net", folder, "--seeds", "0-3", "--out", tmp_path / "out.npz", "--sampler", "heun", "--steps", 4)
    images = expected(heun(load_network(folder), latents(range(4), (1, 8, 8))[0], steps=4))
    assert np.abs(npz_images(tmp_path / "out.npz").astype(int) - images).max() <= 1


def test_classes_are_drawn_or_chosen(conditional, tmp_path):
    sample("--net", conditional, "--seeds", "0-19", "--out", tmp_path / "drawn.zip")
    sample("--net", conditional, "--seeds", "0-19", "--out", tmp_path / "chosen.npz", "--class", 2)
    drawn = open_dataset(tmp_path / "drawn.zip", use_labels=True)
    classes = [drawn.label(i) for i in range(20)]
    assert classes == latents(range(20), (1, 8, 8), 5)[1].argmax(1).tolist()
    with np.load(tmp_path / "chosen.npz") as chosen:
        assert chosen["arr_1"].tolist() == [2] * 20
        same = [np.abs(chosen["arr_0"][i, ..., 0].astype(int) - drawn.image(i)[0]).max() <= 1 for i in range(20)]
    assert [c == 2 for c in classes] == same, "the class changes the image, and nothing else does"


def test_a_run_folder_gives_its_moving_average(tmp_path):
    save_network(tiny(GDDPrecond), tmp_path / "run" / RUN_GENERATOR)
    save_network(tiny(GDDPrecond), tmp_path / "net")
    for name in ("run", "net"):
        sample("--net", tmp_path / name, "--seeds", "0-3", "--out", tmp_path / f"{name}.npz")
    assert np.array_equal(npz_images(tmp_path / "run.npz"), npz_images(tmp_path / "net.npz"))


@pytest.mark.parametrize(("name", "number"), [("out.zip", signal.SIGINT), ("out", signal.SIGTERM)])
def test_an_interrupted_run_goes_on(conditional, tmp_path, monkeypatch, capsys, name, number):
    def options(where):
        return ["--net", conditional, "--seeds", "0-9", "--batch", 2, "--out", where, "--grid", tmp_path / "g.png"]

    def interrupted(*args, **kwargs):
        batches = launch(*args, **kwargs)
        yield from itertools.islice(batches, 4)
        signal.raise_signal(number)  # while two batches are on their way

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("gdd_fast.sample.launch", interrupted)
        sample(*options(tmp_path / name))
    assert end.value.code == 128 + number
    assert not (tmp_path / name).exists()

    with pytest.raises(SystemExit):
        sample(*options(tmp_path / name), "--class", 1)
    assert "another class" in capsys.readouterr().err
    sample(*options(tmp_path / name))
    captured = capsys.readouterr()
    assert "resuming after 4 images" in captured.out + captured.err
    grid = (tmp_path / "g.png").read_bytes()
    sample(*options(tmp_path / f"whole-{name}"))
    assert (tmp_path / "g.png").read_bytes() == grid
    here, whole = (open_dataset(tmp_path / path, use_labels=True) for path in (name, f"whole-{name}"))
    assert len(here) == len(whole) == 10
    for i in range(10):
        assert np.array_equal(here.image(i), whole.image(i))
        assert here.label(i) == whole.label(i)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.png", name, f"whole-{name}"]


def test_a_scheduler_that_ends_the_process_loses_nothing(folder, tmp_path):
    out = tmp_path / "out.zip"
    arguments = ["--net", str(folder), "--seeds", "0-99999", "--batch", "2", "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gdd_fast.sample", *arguments],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(part_folder(out).rglob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, error
    assert "\nterminated\n" in error and "Traceback" not in error
    kept = open_dataset(part_folder(out) / "images")
    kept.validate()
    assert len(kept) > 0 and not list(part_folder(out).rglob(".*"))


def test_a_second_process_is_refused_before_it_loads_its_network(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.zip"
    with reserve(out), pytest.raises(SystemExit) as end:
        monkeypatch.setattr("gdd_fast.sample.load_generator", lambda *_, **__: pytest.fail("loads its network"))
        sample("--net", folder, "--out", out)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: another process is writing {out}; let it end, or name another --out\n"


def test_an_output_of_a_network_that_is_not_there_is_not_begun(tmp_path):
    with pytest.raises(SystemExit):
        sample("--net", tmp_path / "nowhere", "--out", tmp_path / "new" / "out.zip")
    assert not list(tmp_path.iterdir())


def test_the_compute_type_is_obeyed(folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        sample("--net", folder, "--seeds", "0-3", "--out", tmp_path / f"{dtype}.npz", "--dtype", dtype)
    full, half = (npz_images(tmp_path / f"{dtype}.npz").astype(int) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).max() < 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "g.png", "--seeds", "5-1"], "--seeds"),
        (["--grid", "g.png", "--seeds", "one"], "--seeds"),
        (["--grid", "g.png", "--class", "0"], "unconditional"),
        (["--grid", "g.jpg"], "--grid"),
        (["--out", "o.png"], "--out"),
        (["--grid", "g.png", "--batch", "0"], "--batch"),
        (["--grid", "g.png", "--sampler", "heun", "--steps", "0"], "step"),
        (["--grid", "g.png", "--device", "gpu"], "--device"),
        (["--grid", "g.png", "--engine", "graph", "--device", "cpu"], "needs CUDA"),
        (["--grid", "g.png", "--engine", "compile", "--sampler", "heun"], "--engine"),
        ([], "--out"),
    ],
)
def test_bad_options_give_one_line_and_write_nothing(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--net", str(folder), *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_class_beyond_the_last(conditional, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample("--net", conditional, "--class", 5, "--out", tmp_path / "o.zip")
    assert "classes 0 to 4" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--grid", "g.png"], ["--net", "nowhere", "--grid", "g.png"]])
def test_without_a_network(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "--net" in captured.err + captured.out or "nowhere" in captured.err


@pytest.mark.parametrize("option", ["--out=a.zip", "--out=b.npz", "--grid=g.png"])
def test_maps_that_are_no_images_are_refused_and_leave_nothing(tmp_path, monkeypatch, capsys, option):
    """Networks of 4 channels make latents of another network."""
    save_network(tiny(channels=4), tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        sample("--net", "net", "--seeds", "0-3", option)
    assert "maps of 4 channels, but image files have 1 or 3" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["net"]
