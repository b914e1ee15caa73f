"""`python -m gdd_fast.evaluate`: distances of generators and of stored images, references kept and reused."""

import errno
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch

from gdd_fast import evaluate as evaluate_command
from gdd_fast.data.demo import demo_dataset
from gdd_fast.evaluate import main
from gdd_fast.metrics.features.efficientnet_lite import Lite0Features
from gdd_fast.metrics.features.pixels import PixelFeatures
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.sample import main as sample
from gdd_fast.sampling.resume import reserve

SMALL = ["--device", "cpu", "--features", "pixels"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """128 bundled images as a zip."""
    path = tmp_path_factory.mktemp("data") / "real.zip"
    images = np.concatenate(list(demo_dataset("test", max_images=128).chunks()))
    with reserve(path) as output, output.writer(range(len(images)), {}) as writer:
        writer.put(range(len(images)), torch.from_numpy(images).permute(0, 2, 3, 1))
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    network = EDMPrecond(
        16, 1, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    save_network(network, path)
    return path


@pytest.fixture
def evaluate(capsys):
    def run(*args) -> dict:
        main([str(arg) for arg in (*args, *SMALL, "--json")])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def keep(capsys):
    def run(*args) -> str:
        main(["ref", *map(str, args), *SMALL])
        return capsys.readouterr().out.splitlines()[-1]

    return run


def test_a_generator_against_a_data_set(net, real, capsys):
    main(["--net", str(net), "--data", str(real), "--images", "40", "--device", "cpu", "--features", "lite0, pixels"])
    out = capsys.readouterr().out
    assert "40 images against 128 real ones" in out
    assert "FD-lite0-64" in out
    assert "FD-pixels-16" in out


def test_a_set_has_no_distance_to_itself(real, evaluate):
    result = evaluate("--samples", real, "--data", real)
    assert result["generated_images"] == result["real_images"] == 128
    assert result["metrics"]["fd-pixels-16"] == pytest.approx(0, abs=1e-6)


def test_generating_and_storing_first_give_the_same_distance(net, real, tmp_path, evaluate):
    direct = evaluate("--net", net, "--data", real, "--seeds", "10-49", "--sampler", "heun", "--steps", 3)
    for name in ("out.zip", "out.npz", "out"):
        out = ["--out", str(tmp_path / name), "--device", "cpu"]
        sample(["--net", str(net), "--seeds", "10-49", "--sampler", "heun", "--steps", "3", *out])
        stored = evaluate("--samples", tmp_path / name, "--data", real)
        assert stored["generated_images"] == 40
        assert stored["metrics"] == pytest.approx(direct["metrics"], rel=1e-6)


def test_a_kept_reference_stands_for_its_data_set(net, real, tmp_path, evaluate, keep):
    reference = tmp_path / "ref.npz"
    assert keep("--data", real, "--out", reference) == "statistics of 128 real images -> " + str(reference)
    by_data = evaluate("--net", net, "--data", real, "--images", 30)
    by_reference = evaluate("--net", net, "--ref", reference, "--images", 30)
    assert by_reference["metrics"] == pytest.approx(by_data["metrics"])
    assert by_reference["real_images"] == 128


def test_a_network_with_a_reference_does_not_look_at_the_real_images(net, real, tmp_path, capsys, monkeypatch, keep):
    """Inception on a CPU takes minutes for what its reference already says."""
    keep("--data", real, "--out", tmp_path / "ref.npz", "--data-images", 100)
    seen = {}
    for kind in (PixelFeatures, Lite0Features):
        monkeypatch.setattr(kind, "__call__", counting(kind, seen))
    asked = ["--net", net, "--data", real, "--images", "30", "--metrics", "fd@pixels,fd@lite0", "--device", "cpu"]
    main([*map(str, asked), "--json"])
    by_data = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert seen == {PixelFeatures: 158, Lite0Features: 158}
    seen.clear()
    main([*map(str, asked), "--ref", str(tmp_path / "ref.npz"), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert seen == {PixelFeatures: 31, Lite0Features: 159}, "one more to learn how many features there are"
    assert found["fd-lite0-64"] == pytest.approx(by_data["fd-lite0-64"])
    assert found["fd-pixels-16"] != pytest.approx(by_data["fd-pixels-16"]), "of the 100 images of the reference"


def test_nearest_images_are_those_of_the_data_whatever_a_reference_holds(net, real, tmp_path, capsys, keep):
    keep("--data", "demo-test", "--out", tmp_path / "ref.npz", "--with-features", "--data-images", 100)
    asked = ["--net", net, "--data", real, "--images", "30", "--metrics", "nn@pixels", "--device", "cpu", "--json"]
    values = []
    for name, more in (("data", []), ("reference", ["--ref", tmp_path / "ref.npz"])):
        main([*map(str, [*asked, "--nn-sheet", tmp_path / f"{name}.png", *more])])
        values.append(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"])
    assert values[0] == values[1]
    assert (tmp_path / "data.png").read_bytes() == (tmp_path / "reference.png").read_bytes()


def test_values_are_said_although_their_sheet_cannot_be_written(net, real, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "sheet.png")

    monkeypatch.setattr("gdd_fast.metrics.memorisation.save_panel", full)
    asked = ["--net", net, "--data", real, "--images", "30", "--metrics", "nn@pixels", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*map(str, asked), "--nn-sheet", str(tmp_path / "sheet.png")])
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["metrics"] and "sheet.png: No space left" in said.err


def counting(kind, seen):
    keep = kind.__call__

    def call(self, images):
        seen[kind] = seen.get(kind, 0) + len(images)
        return keep(self, images)

    return call


def test_parts_of_the_sets(real, evaluate):
    result = evaluate("--samples", real, "--data", real, "--images", 50, "--data-images", 60)
    assert (result["generated_images"], result["real_images"]) == (50, 60)


def fails(capsys, *args) -> str:
    with pytest.raises(SystemExit) as end:
        main([*map(str, args), "--device", "cpu"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, "one line, and no progress bar: nothing has started"
    return captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "demo"], "--net or --samples"),
        (["--net", "demo"], "--data"),
        (["--net", "demo", "--samples", "x", "--data", "demo"], "choose one"),
        (["ref", "--data", "demo", "--out", "x.npz", "--features", "lite0,pixels"], "lite0,pixels"),
        (["ref", "--data", "demo", "--out", "x.pt", "--features", "pixels"], "--out"),
        (["--net", "demo", "--data", "demo", "--metrics", "fdi"], "fdi"),
        (["--net", "demo", "--data", "demo", "--metrics", "fid@lite0"], "fd@lite0"),
        (["--net", "demo", "--data", "demo", "--metrics", "kid,kid@inception"], "twice"),
        (["--net", "demo", "--ref", "x.npz", "--metrics", "nn@pixels"], "--data"),
        (["--samples", "x", "--data", "demo", "--rounds", "3"], "--rounds"),
        (["--net", "demo", "--data", "demo", "--held-out", "demo-test"], "--held-out"),
        (["--net", "demo", "--data", "demo", "--images", "1"], "--images"),
        (["--net", "demo", "--data", "demo", "--seeds", "3"], "at least 2"),
        (["--net", "demo", "--data", "demo", "--metrics", "pr@pixels", "--images", "3"], "at least 4 generated"),
        (["--net", "demo", "--data", "demo", "--metrics", "dc@pixels", "--data-images", "5"], "at least 6 real"),
        (["--net", "demo", "--data", "demo", "--metrics", "fd@lpips"], "too many features"),
        (["--net", "demo", "--data", "demo", "--features", "pixels,pixels"], "twice"),
        (["--net", "demo", "--data", "demo", "--features", "fid"], "fid"),
        (["--samples", "nowhere", "--data", "demo-test", "--features", "pixels"], "nowhere"),
        (["--net", "nowhere", "--data", "demo-test", "--features", "pixels"], "nowhere"),
        (["--net", "demo", "--ref", "nowhere.npz", "--features", "pixels"], "nowhere"),
        (["--samples", "x", "--data", "demo", "--seeds", "0-9"], "--seeds"),
        (["--samples", "x", "--data", "demo", "--class", "3"], "--class"),
        (["--samples", "x", "--data", "demo", "--dtype", "float16"], "--dtype"),
        (["--samples", "x", "--data", "demo", "--sampler", "heun"], "--sampler"),
        (["--samples", "x", "--data", "demo", "--sigma-max", "40"], "--sampler"),
        (["--net", "demo", "--ref", "x.npz", "--features", "pixels", "--data-images", "9"], "--data-images"),
        (["--net", "demo", "--data", "demo", "--seeds", "0-9", "--images", "20"], "--images"),
        (["--net", "demo", "--data", "demo", "--features", "pixels", "--feature-weights", "lite0=x"], "lite0"),
        (["--net", "demo", "--data", "demo", "--features", "pixels", "--feature-weights", "x"], "name=path"),
        (["--net", "demo", "--data", "demo", "--steps", "4"], "--steps 4 is for --sampler heun"),
        (["--net", "demo", "--data", "demo", "--s-churn", "1"], "--s-churn"),
        *(
            (["--net", "demo", "--data", "demo", "--sampler", "heun", option, value], f"{option} must be a finite")
            for option in ("--rho", "--s-churn", "--s-min", "--s-noise", "--s-max", "--sigma-min", "--sigma-max")
            for value in ("nan", "-inf")
        ),
    ],
)
def test_bad_options(capsys, options, message):
    assert message in fails(capsys, *options)


def test_a_reference_of_other_features(net, real, tmp_path, keep, capsys):
    keep("--data", real, "--out", tmp_path / "ref.npz", "--feature-resolution", 8)
    message = fails(capsys, "--net", net, "--ref", tmp_path / "ref.npz", "--features", "pixels")
    assert "pixels-8" in message
    assert "pixels-16" in message


@pytest.mark.parametrize("option", ["--samples", "--held-out"])
def test_a_damaged_image_is_found_before_the_others_are_measured(net, real, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(PixelFeatures, "__call__", lambda *_: pytest.fail("measured"))
    with zipfile.ZipFile(real) as whole, zipfile.ZipFile(tmp_path / "damaged.zip", "w") as damaged:
        for place, name in enumerate(whole.namelist()):
            damaged.writestr(name, whole.read(name)[: -30 if place == 9 else None])
    more = [] if option == "--samples" else ["--net", net, "--metrics", "nn"]
    message = fails(capsys, "--data", real, "--features", "pixels", option, tmp_path / "damaged.zip", *more)
    assert "damaged.zip" in message and "000009" in message


def test_reading_the_images_first_is_shown(real, capsys, monkeypatch):
    bar = evaluate_command.image_bar
    monkeypatch.setattr(evaluate_command, "image_bar", lambda *args, delay=0: bar(*args))  # if it takes a while
    main([str(word) for word in ("--data", real, "--samples", real, "--features", "pixels")])
    assert re.search(r"checked: 100%.* 128/128", capsys.readouterr().err)


def test_images_of_another_size(net, real, tmp_path, keep, capsys):
    with reserve(tmp_path / "big.zip") as output, output.writer(range(4), {}) as writer:
        writer.put(range(4), torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    message = fails(capsys, "--samples", tmp_path / "big.zip", "--data", real, "--features", "pixels")
    assert "3 x 32^2" in message
    assert "1 x 16^2" in message
    keep("--data", tmp_path / "big.zip", "--out", tmp_path / "ref.npz")
    for ours in (["--samples", real], ["--net", net]):
        message = fails(capsys, *ours, "--ref", tmp_path / "ref.npz", "--features", "pixels")
        assert "1 x 16^2" in message
        assert "3 x 32^2" in message
        assert "ref.npz" in message


def test_an_infinite_s_max_is_no_bound(net, real, evaluate):
    options = ["--images", 2, "--sampler", "heun", "--steps", 2, "--s-churn", 1]
    evaluate("--net", net, "--data", real, *options, "--s-max", "inf")
