"""One backend for a whole run: who gets it, who falls back, what is refused."""

import importlib
import pkgutil
import re

import pytest
import torch
from tiny_run import ALONE, BATCH, tiny_config

import gdd_fast.ops
from gdd_fast.backend import Operator, obstacle, resolve_all, summary
from gdd_fast.distill import components, dry_run
from gdd_fast.distill.gdd import Distillation
from gdd_fast.distill.pretraining import PretrainConfig, Pretraining
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import BackendError
from gdd_fast.evaluate import main as evaluate
from gdd_fast.layers.backends import choose_backend, operators_of
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond
from gdd_fast.sample import main as sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("plain")

CPP, NEITHER = Operator("a", fused=frozenset({"cpp"})), Operator("d", fused=frozenset())
TRITON, BOTH = Operator("b", fused=frozenset({"triton"})), Operator("c", fused=frozenset({"cpp", "triton"}))
needs_extension = pytest.mark.skipif(
    obstacle(CPP, "cpp", "cpu") is not None, reason="the extension gdd_fast._C is not built"
)


@needs_extension
def test_a_named_backend_is_for_the_operators_that_have_it():
    assert resolve_all("cpp", [BOTH, CPP, TRITON, NEITHER], "cpu") == {
        "a": "cpp",
        "b": "torch",
        "c": "cpp",
        "d": "torch",
    }
    assert resolve_all("torch", [CPP, BOTH], "cpu") == {"a": "torch", "c": "torch"}
    assert resolve_all("auto", [CPP, NEITHER], "cpu") == {"a": "cpp", "d": "torch"}
    assert summary(resolve_all("cpp", [CPP, NEITHER, BOTH], "cpu")) == "torch for d; cpp for a, c"


@pytest.mark.parametrize(
    ("backend", "operators", "device", "reason"),
    [
        ("triton", [CPP, NEITHER], "cpu", "backend 'triton': none of a, d has it"),
        ("cpp", [CPP, NEITHER], "cuda", "takes CPU tensors, not cuda"),
        ("triton", [TRITON, NEITHER], "mps", "Triton kernels take CUDA tensors"),
        ("numpy", [CPP], "cpu", "unknown backend 'numpy'"),
    ],
)
def test_what_can_run_nothing_is_refused_with_the_reason(backend, operators, device, reason):
    with pytest.raises(BackendError, match=reason):
        resolve_all(backend, operators, device)


def test_triton_on_a_cpu_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="backend 'triton' cannot run here"):
        components.build(tiny_config(tmp_path, backend="triton"))  # an empty folder: neither data nor teacher


def spy(monkeypatch):
    """What each operator that is called resolves to, by its name."""
    called: dict[str, set[str]] = {}
    operators = [importlib.import_module(f"gdd_fast.ops.{m.name}") for m in pkgutil.iter_modules(gdd_fast.ops.__path__)]
    for module in (gdd_fast.backend, *operators):  # in the first, what `chooser` calls
        if hasattr(module, "resolve"):

            def resolve(backend, operator, device, original=module.resolve):
                chosen = original(backend, operator, device)
                called.setdefault(operator.name, set()).add(chosen)
                return chosen

            monkeypatch.setattr(module, "resolve", resolve)
    return called


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("cpp", marks=needs_extension)])
def test_every_operator_of_a_run_runs_what_the_dry_run_shows(inputs, tmp_path, monkeypatch, backend):
    """Training steps, the R1 step, and the sample grid of the averaged network."""
    config = tiny_config(inputs, backend=backend, run_dir=tmp_path, r1_interval=1)
    built = components.build(config)
    called = spy(monkeypatch)
    task = Distillation(config, built, ALONE)
    for number in range(2):
        task.iteration(number * BATCH)
    task.tick(2 * BATCH)
    assert called == {name: {chosen} for name, chosen in built.operators.items()}
    assert summary(built.operators) in dry_run.describe(config, built)
    assert built.operators.keys() >= {
        "adam_ema", "attention", "frozen_conv2d_relu", "group_norm_silu", "resample2d", "residual",
    }  # fmt: skip
    if backend == "torch":
        assert set(built.operators.values()) == {"torch"}


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_extension)])
def test_pretraining_has_the_same_switch(inputs, tmp_path, monkeypatch, backend):
    config = PretrainConfig(
        data=str(inputs / "data.zip"), run_dir=tmp_path, model_channels=8, num_blocks=1, batch=4, device="cpu",
        backend=backend,
    )  # fmt: skip
    called = spy(monkeypatch)
    task = Pretraining(config, ALONE)
    task.iteration(0)
    task.tick(4)
    assert called == {name: {chosen} for name, chosen in task.operators.items()}
    assert task.operators["adam_ema"] == task.operators["group_norm_silu"] == backend


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_extension)])
def test_sampling_and_evaluation_have_the_same_switch(inputs, tmp_path, monkeypatch, backend):
    called = spy(monkeypatch)
    common = ["--net", str(inputs / "teacher"), "--device", "cpu", "--backend", backend]
    sample([*common, "--seeds", "0-1", "--out", str(tmp_path / "a.npz")])
    assert called["group_norm_silu"] == {backend}
    assert called["attention"] == called["resample2d"] == {"torch"}  # which have no C++
    called.clear()
    evaluate([*common, "--data", str(inputs / "data.zip"), "--images", "2", "--features", "lite0"])
    assert called["frozen_conv2d_relu"] == {backend}


@pytest.mark.parametrize("command", [sample, evaluate], ids=["sample", "evaluate"])
def test_a_backend_that_cannot_run_is_one_error(inputs, tmp_path, capsys, command):
    what = ["--out", "a.npz"] if command is sample else ["--data", str(inputs / "data.zip")]
    with pytest.raises(SystemExit) as end:
        command(["--net", str(inputs / "teacher"), "--device", "cpu", "--backend", "cuda", *what])
    assert end.value.code == 2
    assert "backend 'cuda' cannot run here: the cuda implementation takes CUDA tensors" in capsys.readouterr().err


def attending(channels: int) -> EDMPrecond:
    """A network whose only attention has one head of `channels`."""
    return EDMPrecond(8, 1, model_type="SongUNet", model_channels=channels, channel_mult=[1], num_blocks=1,
                      attn_resolutions=[8])  # fmt: skip


def test_heads_that_the_kernels_do_not_take_are_refused_before_work(tmp_path, capsys):
    pytest.importorskip("triton")
    net, reason = attending(24), r"takes heads of 16, 32, .* not 24 in torch\.float32"
    with pytest.raises(BackendError, match=reason):
        choose_backend("triton", DEVICE, [net])
    assert {layer.backend for layer in net.modules() if hasattr(layer, "backend")} == {"auto"}
    with pytest.raises(BackendError, match=reason):
        OneStepGenerator.from_network(net, device=DEVICE, backend="triton")
    save_network(net, tmp_path / "net")
    with pytest.raises(SystemExit) as end:
        flags = ["--backend", "triton", "--device", DEVICE, "--out", str(tmp_path / "out.zip")]
        sample(["--net", str(tmp_path / "net"), *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(f"error: .*{reason}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert choose_backend("auto", DEVICE, [net])["attention"] == "torch"

    net = attending(16)
    assert choose_backend("triton", DEVICE, [net])["attention"] == "triton"
    OneStepGenerator.from_network(net, device=DEVICE, backend="triton")
    if DEVICE == "cpu":  # the interpreter
        net.dtype = torch.bfloat16
        with pytest.raises(BackendError, match="bfloat16"):
            choose_backend("triton", DEVICE, [net])


def test_a_choice_reaches_the_backbones_pooling(inputs):
    """VGG's poolings and convolutions, and whatever is added to a network with an operator of its own."""
    from gdd_fast.models.backbones.vgg import Vgg16

    backbone = Vgg16(batch_norm=False)
    names = {operator.name for operator in operators_of(backbone)}
    assert names == {"frozen_conv2d_relu", "max_pool2x2"}
    choose_backend("torch", "cpu", [backbone])
    assert {module.backend for module in backbone.modules() if hasattr(module, "backend")} == {"torch"}
