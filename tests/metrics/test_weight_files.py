"""Weights of feature networks in the forms they go around in, told by their digest, found or missing in one line."""

import importlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_libraries  # noqa: F401  (timm imports torchvision)
from torch import nn

from gdd_fast.errors import ConfigError, UnsafePickleError, WeightsError
from gdd_fast.metrics.features import build_extractor
from gdd_fast.metrics.features import weight_files as module
from gdd_fast.metrics.features.inception import InceptionV3, canonical
from gdd_fast.metrics.features.resnet56 import ResNet56
from gdd_fast.metrics.features.weight_files import WeightFile, digest


class Layer(nn.Module):
    """A convolution as StyleGAN's Inception has them."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().clone())
        for name, value in (("beta", norm.bias), ("mean", norm.running_mean), ("var", norm.running_var)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight) + self.beta.sum() + self.mean.sum() + self.var.sum()


class Classifier(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.fixture(scope="module")
def inception():
    """Small random numbers under the names of pytorch-fid's file, and the same network in StyleGAN's layout."""
    torch.manual_seed(0)
    network = InceptionV3()
    for parent, _, norm in network.conv_norms():
        getattr(parent, norm).bias.data.normal_()
        getattr(parent, norm).running_mean.normal_()
    layers = nn.Module()
    for i, (parent, conv, norm) in enumerate(network.conv_norms()):
        layers.add_module(f"conv_{i}", Layer(getattr(parent, conv), getattr(parent, norm)))
    layers.add_module("output", Classifier(network.fc.weight.T))
    other = nn.Module()
    other.layers = layers
    return network, other


def same(found: dict[str, torch.Tensor], network: InceptionV3) -> bool:
    expected = {k: v for k, v in network.state_dict().items() if k != "fc.bias"}
    return digest({k: v for k, v in found.items() if k != "fc.bias"}) == digest(expected)


def test_pytorch_fids_and_torch_fidelitys_names(inception):
    state = inception[0].state_dict()
    assert same(canonical(state), inception[0])
    without_scales = {k: v for k, v in state.items() if not k.endswith("bn.weight")}
    assert same(canonical(without_scales), inception[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stylegans_torchscript_archive(inception, tmp_path):
    torch.jit.save(torch.jit.script(inception[1]), tmp_path / "inception-2015-12-05.pt")
    found = WeightFile("inception", ("x",), "nowhere").read(tmp_path / "inception-2015-12-05.pt")
    assert same(canonical(found), inception[0])


def test_nvidias_pickle_without_its_classes(inception, tmp_path, monkeypatch):
    """The network itself is pickled, by torch_utils.persistence, with layers of torch.nn in between."""
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = lambda meta: None
    persistence._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    persistence._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    class Pickled:
        def __init__(self, of: nn.Module):
            self.of = of

        def __reduce__(self):
            state = dict(self.of.__dict__)
            state["_modules"] = {name: wrap(child) for name, child in self.of._modules.items()}
            for name in list(state):
                if name.endswith("_hooks") or "hook" in name:
                    del state[name]
            meta = dict(type="class", version=6, module_src="raise SystemExit", class_name="Net", state=state)
            return persistence._reconstruct_persistent_obj, (meta,)

    def wrap(module: nn.Module) -> object:
        return module if type(module) is nn.Sequential else Pickled(module)

    network = nn.Module()
    network.body = nn.Sequential(nn.Identity())
    network.net = inception[1]
    (tmp_path / "inception-v3-2015-12-05.pkl").write_bytes(pickle.dumps(Pickled(network), 4))
    monkeypatch.delitem(sys.modules, "torch_utils.persistence")
    found = WeightFile("inception", ("x",), "nowhere").read(tmp_path / "inception-v3-2015-12-05.pkl")
    assert same(canonical(found), inception[0])


def test_arrays_of_jax(tmp_path):
    content = {"Net_0": {"Conv_0": {"kernel": np.ones((3, 3, 1, 2), np.float32), "bias": np.arange(2.0)}}}
    (tmp_path / "net.ckpt").write_bytes(pickle.dumps(content, 3))
    found = WeightFile("net", ("x",), "nowhere").read(tmp_path / "net.ckpt")
    assert found["Net_0.Conv_0.kernel"].shape == (3, 3, 1, 2)
    assert found["Net_0.Conv_0.bias"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["net.pkl", "net.ckpt", "net.pth"])
def test_nothing_in_a_file_runs(name, tmp_path, canary):
    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    content = {"weight": Attack()}
    if name.endswith(".pth"):
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises((UnsafePickleError, WeightsError), match=name.replace(".", r"\.")):
        WeightFile("net", ("x",), "nowhere").read(tmp_path / name)


def test_another_network_and_a_damaged_archive(inception, tmp_path):
    with pytest.raises(WeightsError, match="94"):
        canonical(ResNet56().state_dict())
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises((WeightsError, UnsafePickleError), match=r"b\.pt"):
        WeightFile("net", ("x",), "nowhere").read(tmp_path / "b.pt")


def test_missing_weights_are_one_line_with_name_origin_and_place(monkeypatch, tmp_path):
    monkeypatch.setenv(module.FOLDERS, str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = WeightFile(
        "net", ("net.pth",), "somewhere.org", in_packages=(("no_such_package", "*"),), caches=("~/c/*.pt",)
    )
    with pytest.raises(WeightsError) as error:
        file.find()
    for part in ("net.pth", "somewhere.org", "--feature-weights net=PATH", "GDD_FAST_WEIGHTS"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="there is no such file"):
        file.find(tmp_path / "other.pth")


def test_where_weights_are_looked_for(monkeypatch, tmp_path):
    """First the user's folder, then packages, then other projects' caches."""
    file = WeightFile(
        "net", ("net.pth",), "", in_packages=(("a_package", "weights/*.pth"),), caches=("~/cache/*_net.pth",)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(module.FOLDERS, f"{tmp_path / 'none'}:{tmp_path / 'mine'}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    places = ["cache/123_net.pth", "site/a_package/weights/w.pth", "mine/net.pth"]
    for place in places:
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        if "site" in place:
            (tmp_path / "site/a_package/__init__.py").touch()
        path.touch()
        importlib.invalidate_caches()
        assert file.find() == path


def test_other_weights_have_another_name(tmp_path):
    """What two files of one architecture measure must never be compared."""
    torch.manual_seed(1)
    names = set()
    for number in range(2):
        path = tmp_path / f"{number}.pth"
        torch.save(ResNet56().state_dict(), path)
        names.add(build_extractor("resnet56", weights=path).name)
        assert build_extractor("resnet56", weights=path).name in names, "the same for the same file"
    assert len(names) == 2
    assert all(name.startswith("resnet56-32-") for name in names)


def test_features_that_have_no_weights_or_no_name(tmp_path):
    with pytest.raises(ConfigError, match="pixels have no weights"):
        build_extractor("pixels", weights=Path("x.pth"))
    with pytest.raises(ConfigError, match="timm has no network"):
        build_extractor("timm:no_such_network")
