"""`python -m gdd_fast.export`: a file from a run, and what is refused before a network is read."""

import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_network

from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.export import main
from gdd_fast.models.files.load import RUN_GENERATOR, as_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.sampling.seeds import SeedStreams

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_becomes_a_program(tmp_path, capsys):
    net = as_generator(tiny_network()).eval()
    save_network(net, tmp_path / "run" / RUN_GENERATOR)
    out = tmp_path / "new" / "generator.pt2"
    main(["--net", str(tmp_path / "run"), "--out", str(out), "--sigma", "2.5", "--images", "9"])
    assert "9 images differ from the network's in float32 by at most" in capsys.readouterr().out

    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    latents = SeedStreams([4]).normal(shape)
    expected = OneStepGenerator.from_network(net, sigma=2.5).run(latents)
    with torch.no_grad():
        images = torch.export.load(out).module()(latents)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_program_for_a_full_disk(tmp_path):
    """In a process of its own: PyTorch's writer of files would end it."""
    save_network(tiny_network(), tmp_path / "net")
    script = """
import resource
from gdd_fast.export import main

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
main(["--net", "net", "--out", "new/generator.pt2", "--images", "2"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    line = "error: new/generator.pt2: File too large; make room, or write to another disk"
    assert (found.returncode, found.stderr.splitlines()[-1]) == (2, line)
    assert not os.listdir(tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to write"),
        (["--out", "generator.bin"], "ends in .onnx or .pt2"),
        (["--out", "generator.pt2", "--sigma", "0"], "--sigma"),
        (["--out", "generator.pt2", "--images", "0"], "--images"),
        (["--web", "page", "--grid", "0"], "--grid"),
    ],
)
def test_bad_options_end_before_anything_is_read(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--net", "there-is-none", *arguments])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as end:
        main(["--net", "there-is-none", "--out", str(tmp_path / "generator.onnx")])
    assert end.value.code == 2
    assert "needs onnxscript: pip install 'gdd_fast[export]'" in capsys.readouterr().err
