"""Files that run without gdd_fast: programs of torch.export, and every architecture as ONNX."""

import subprocess
import sys

import pytest
import torch
from edm_reference import SIZE, SMALL, fill
from safetensors.torch import load_file, save_file

from gdd_fast.engine import portable
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.engine.portable import trace, write_portable
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.precond import GDDPrecond


def network(name: str) -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL[name])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program():
    return trace(network("adm_cond"), "float16")


def test_program_loads_without_gdd_fast(program, monkeypatch, tmp_path):
    net = network("adm_cond")
    monkeypatch.setattr(portable, "trace", lambda net, dtype, sigma: program)
    difference = write_portable(net, tmp_path / "generator.pt2", dtype="float16", images=3)
    assert 0 < difference.worst < 0.05 and difference.images == 3  # it is float16

    generator = OneStepGenerator.from_network(net, device="cpu", dtype="float16", engine="eager", backend="torch")
    latents, classes = generator.draw(1, seeds=[7])
    save_file({"latents": latents, "classes": classes}, tmp_path / "in.safetensors")
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "function = torch.export.load('generator.pt2').module()\n"
        "with torch.no_grad(): images = function(*(load_file('in.safetensors')[k] for k in ('latents', 'classes')))\n"
        "save_file({'images': images.contiguous()}, 'out.safetensors')\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'gdd_fast']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = load_file(tmp_path / "out.safetensors")["images"]
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, generator.run(latents, classes), rtol=0, atol=0.02)


def test_file_of_another_function_is_not_left_behind(program, monkeypatch, tmp_path):
    net = network("adm_cond")
    with torch.no_grad():
        net.model.out_conv.weight[0, 0, 1, 1] += 1
    monkeypatch.setattr(portable, "trace", lambda net, dtype, sigma: program)
    path = tmp_path / "generator.pt2"
    path.write_text("an older file")
    with pytest.raises(WeightsError, match=r"generator\.pt2 was not written"):
        write_portable(net, path, dtype="float16", images=2)
    assert path.read_text() == "an older file" and list(tmp_path.iterdir()) == [path]


def test_bad_requests(tmp_path):
    net = network("ddpmpp")
    for name, options, reason in (
        ("generator.tflite", {}, r"ends in \.onnx or \.pt2"),
        ("generator.pt2", {"dtype": "bfloat16"}, "float32 or float16"),
        ("generator.pt2", {"images": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write_portable(net, tmp_path / name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_every_architecture(name, dtype, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    difference = write_portable(network(name), tmp_path / "generator.onnx", dtype=dtype, images=17)
    assert difference.worst < (1e-4 if dtype == "float32" else 0.1)
