"""Weights alone become a network that is named beside them, and what they are not is said in one line."""

from pathlib import Path

import edm_files
import pytest
import torch
from edm_reference import AUGMENT_DIM, FULL, SIZE, SMALL, fill
from safetensors.torch import save_file

from gdd_fast.bundled import BUNDLED_TEACHER
from gdd_fast.config import DEMO, PRESETS
from gdd_fast.convert import ConvertConfig, convert
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.models.edm import PUBLISHED, published
from gdd_fast.models.files.load import load_generator, network_like
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond, GDDPrecond


@pytest.fixture(scope="module")
def net() -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL["ncsnpp"])).eval().requires_grad_(False)


@pytest.fixture
def like(net: GDDPrecond, tmp_path: Path) -> str:
    """A network of the same kind with other weights, and without an augmentation layer."""
    other = GDDPrecond(SIZE, 3, **{**SMALL["ncsnpp"], "augment_dim": 0})
    save_network(other, tmp_path / "like")
    return str(tmp_path / "like")


def names(net: GDDPrecond, form: str) -> dict[str, torch.Tensor]:
    state = net.state_dict()
    match form:
        case "as in EDM":
            return state
        case "within another module":
            return {f"module.net.{name}": tensor for name, tensor in state.items()}
        case _:
            return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["as in EDM", "within another module", "the U-Net alone"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_weights_alone_become_a_network(net, like, tmp_path, suffix, form):
    path, state = tmp_path / f"weights{suffix}", names(net, form)
    if suffix == ".safetensors":
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        torch.save({"ema": state, "step": 3} if suffix == ".pt" else state, path)
    convert(ConvertConfig(path, tmp_path / "network", like=like))
    found = load_generator(tmp_path / "network")
    assert type(found) is GDDPrecond and all(p.dtype == torch.float32 for p in found.parameters())
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 80
    tolerance = {"rtol": 0, "atol": 0.05 if suffix == ".safetensors" else 0}
    with torch.no_grad():
        torch.testing.assert_close(found(x, 80.0), net(x, 80.0), **tolerance)


@pytest.mark.parametrize("preset", ["demo", "demo-gdd"])
def test_the_demos_presets_name_its_teacher(tmp_path, preset):
    teacher = load_generator(BUNDLED_TEACHER)
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    torch.testing.assert_close(network_like(tmp_path / "weights.pt", preset).state_dict(), teacher.state_dict())


def test_the_augmentation_layer_is_as_in_the_file(net, like, tmp_path):
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    found = network_like(tmp_path / "weights.pth", like).requires_grad_(False)
    assert found.model_kwargs["augment_dim"] == AUGMENT_DIM
    labels = torch.ones(1, AUGMENT_DIM)
    x = torch.ones(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(found(x, 2.0, augment_labels=labels), net(x, 2.0, augment_labels=labels))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("blocks.0.adaLN_modulation.1.weight", "a DiT"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a latent diffusion model"),
        ("unet.enc.64x64_block0.emb_gain", "EDM2"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("transformer.wte.weight", "no network with EDM's names"),
    ],
)
def test_other_projects_networks_are_refused_in_one_line(tmp_path, name, what):
    path = tmp_path / "other.pth"
    torch.save({name: torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=what) as raised:
        network_like(path, "cifar10-cond")
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path, canary):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK\x03\x04 no archive")
    hostile = tmp_path / "hostile.pt"
    torch.save({"ema": edm_files.Reduced(Path.touch, canary)}, hostile)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    several = tmp_path / "several.pt"
    torch.save({"net": {"a": torch.zeros(1)}, "opt": {"b": torch.zeros(1)}}, several)
    (tmp_path / "text.pt").write_text("hello")
    for path, reason in (
        (broken, "cannot be read"),
        (tmp_path / "text.pt", "not a torch.save file"),
        (hostile, "more than tensors"),
        (empty, "cannot be read"),
        (several, "--key can be net or opt"),
        (tmp_path / "none.pth", "no such file"),
    ):
        with pytest.raises(WeightsError, match=reason) as raised:
            network_like(path, "cifar10-cond")
        assert str(path) in str(raised.value)
    assert not canary.exists()


def test_what_the_command_and_the_loader_say(net, like, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    with pytest.raises(ConfigError, match="pass --like"):
        convert(ConvertConfig(path, tmp_path / "out"))
    with pytest.raises(WeightsError, match=r"weights\.pth holds weights alone.*--like"):
        load_generator(path)
    with pytest.raises(ConfigError, match="says what it is"):
        convert(ConvertConfig(Path(like), tmp_path / "out", like="cifar10-cond"))
    with pytest.raises(WeightsError, match="no such network"):
        network_like(path, "cifar11")
    with pytest.raises(WeightsError, match=r"weights\.pth as cifar10-cond: the weights do not fit"):
        network_like(path, "cifar10-cond")
    assert not (tmp_path / "out").exists()


def test_published_networks_are_the_papers():
    for name in PRESETS:
        assert (published(name) is None) == name.startswith(DEMO)
    sizes = {
        "cifar10-cond": FULL["cifar10-cond"],
        "imagenet-64-gdd-i": FULL["imagenet"],
        "ffhq-64": FULL["ffhq-afhqv2"],
    }
    with torch.device("meta"):
        for name, (size, arguments) in sizes.items():
            expected = EDMPrecond(size, 3, **arguments).init_config()
            assert EDMPrecond(**published(name)).init_config() == expected
        for name, arguments in PUBLISHED.items():
            found = EDMPrecond(**arguments)
            assert f"{found.img_resolution}x{found.img_resolution}" in name and published(f"{name}.pkl") is arguments
            assert (found.label_dim > 0) == ("uncond" not in name)


def test_force_fp32(net):
    half = GDDPrecond(**{**net.init_config(), "dtype": "bfloat16"}).requires_grad_(False)
    half.load_state_dict(net.state_dict())
    x, sigma = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 3.0])
    with torch.no_grad():
        assert torch.equal(half(x, sigma, None, force_fp32=True), net(x, sigma))
        assert not torch.equal(half(x, sigma), net(x, sigma))
