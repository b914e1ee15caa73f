"""Networks go from pickles to folders to state_dict files and stay the same."""

import json
import subprocess
import sys

import edm_files
import numpy as np
import pytest
import safetensors.torch
import torch

from gdd_fast.convert import ConvertConfig, convert, main
from gdd_fast.errors import ConfigError, UnsafePickleError, WeightsError
from gdd_fast.models.files.load import RUN_GENERATOR, load_network
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond, GDDPrecond

ARGUMENTS = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
    "channel_mult_noise": 2,
    "augment_dim": 9,
    "dropout": 0.13,
}


def make(cls: type[EDMPrecond], seed: int) -> EDMPrecond:
    net = cls(**ARGUMENTS).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return net


@pytest.fixture
def nets() -> dict[str, EDMPrecond]:
    return {"ema": make(EDMPrecond, 0), "net": make(GDDPrecond, 1)}


@pytest.fixture
def pickled(tmp_path, nets):
    """A training snapshot with two networks."""
    keywords = {**ARGUMENTS, "use_fp16": True, "dropout": np.float64(0.13)}
    content = {key: edm_files.network(net, type(net).__name__, keywords) for key, net in nets.items()}
    return edm_files.write(tmp_path / "snapshot.pkl", content)


def output(net: EDMPrecond) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net(x, torch.tensor([0.5, 80.0]), torch.eye(4)[:2])


def assert_same_state(state: dict[str, torch.Tensor], net: EDMPrecond) -> None:
    expected = net.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("key", ["ema", "net"])
def test_pickle_to_folder(tmp_path, pickled, nets, key):
    converted = convert(ConvertConfig(pickled, tmp_path / "folder.v2", key=key))
    assert json.loads((tmp_path / "folder.v2" / "config.json").read_text())["format"] == "gdd_fast.network"
    for net in (converted, load_network(tmp_path / "folder.v2")):
        assert type(net) is type(nets[key])
        assert_same_state(net.state_dict(), nets[key])
        assert torch.equal(output(net), output(nets[key]))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("source", ["pickle", "folder", "run"])
def test_to_state_dict(tmp_path, pickled, nets, source, suffix):
    """The file has EDM's names and plain tensors, so any network of the same architecture takes it strictly."""
    folder = tmp_path / "run" / RUN_GENERATOR
    save_network(nets["ema"], folder)
    source = {"pickle": pickled, "folder": folder, "run": folder.parent}[source]
    path = tmp_path / f"state{suffix}"
    convert(ConvertConfig(source, path))
    state = torch.load(path, weights_only=True) if suffix == ".pt" else safetensors.torch.load_file(path)
    assert type(state) is dict
    assert_same_state(state, nets["ema"])
    fresh = make(EDMPrecond, 5)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(output(fresh), output(nets["ema"]))


def test_command(tmp_path, pickled, capsys):
    """What a user types: the report says what was converted, with arguments that rebuild the network."""
    command = [sys.executable, "-m", "gdd_fast.convert", str(pickled), str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "EDMPrecond with SongUNet" in done.stdout and "3x8x8, 4 classes" in done.stdout
    arguments = next(line for line in done.stdout.splitlines() if line.startswith("arguments: "))
    rebuilt = EDMPrecond(**json.loads(arguments.removeprefix("arguments: ")))
    rebuilt.load_state_dict(load_network(tmp_path / "folder").state_dict(), strict=True)
    with pytest.raises(SystemExit) as caught:
        main(command[3:])
    message = f"error: {tmp_path / 'folder'} exists: give another destination, or --overwrite to replace it\n"
    assert caught.value.code == 2 and capsys.readouterr().err == message


def test_existing_destination(tmp_path, pickled, nets):
    folder, path = tmp_path / "folder", tmp_path / "state.pt"
    folder.mkdir()
    convert(ConvertConfig(pickled, folder))  # an empty folder is no loss
    convert(ConvertConfig(pickled, path))
    before = path.read_bytes()
    for destination in (folder, path):
        with pytest.raises(ConfigError, match="--overwrite"):
            convert(ConvertConfig(pickled, destination, key="net"))
    assert path.read_bytes() == before
    assert_same_state(load_network(folder).state_dict(), nets["ema"])
    for destination in (folder, path):
        convert(ConvertConfig(pickled, destination, key="net", overwrite=True))
    assert_same_state(load_network(folder).state_dict(), nets["net"])
    assert_same_state(torch.load(path, weights_only=True), nets["net"])


def test_destinations_that_cannot_be(tmp_path, pickled, nets):
    save_network(nets["ema"], tmp_path / "folder")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_text("")
    for source, destination, match in (
        (pickled, "net.pkl", "give a folder's name"),
        (pickled, "net.pth", ".safetensors or .pt"),
        (pickled, "folder.pt", "is a folder"),
        (pickled, "file", "is a file"),
        (tmp_path / "folder", "folder", "is the source itself"),
    ):
        with pytest.raises(ConfigError, match=match):
            convert(ConvertConfig(source, tmp_path / destination, overwrite=True))


def test_sources_that_cannot_be(tmp_path, pickled):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged.pkl"
    damaged.write_bytes(pickled.read_bytes()[:-100])
    foreign = edm_files.write(tmp_path / "foreign.pkl", {"ema": edm_files.tiny(class_name="VPPrecond")})
    misfit = edm_files.write(tmp_path / "misfit.pkl", {"ema": edm_files.tiny()})
    for source, key, error, match in (
        (tmp_path / "absent.pkl", "ema", WeightsError, "no such file"),
        (tmp_path / "empty", "ema", WeightsError, "config.json"),
        (pickled, "teacher", WeightsError, "--key can be ema or net"),
        (damaged, "ema", UnsafePickleError, "too early"),
        (foreign, "ema", WeightsError, "VPPrecond"),
        (misfit, "ema", WeightsError, "cannot be built|do not fit"),
    ):
        with pytest.raises(error, match=match):
            convert(ConvertConfig(source, tmp_path / "out.pt", key=key))
    assert not (tmp_path / "out.pt").exists()


def test_unknown_option(pickled, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(pickled), str(tmp_path / "out"), "--keys", "ema"])
    assert caught.value.code == 2 and "--keys" in capsys.readouterr().err


def test_a_run_s_generator_as_a_half_precision_folder(tmp_path, nets):
    save_network(nets["ema"], tmp_path / "run" / "generator_ema")
    convert(ConvertConfig(tmp_path / "run", tmp_path / "small", dtype="float16"))
    stored = safetensors.torch.load_file(tmp_path / "small" / "model.safetensors")
    parameters = dict(nets["ema"].named_parameters())
    assert all(t.dtype == (torch.float16 if name in parameters else torch.float32) for name, t in stored.items())
    assert_same_state({name: tensor.float() for name, tensor in stored.items()}, load_network(tmp_path / "small"))


def test_a_state_dict_file_is_float32(tmp_path, pickled):
    with pytest.raises(ConfigError, match="--dtype float16"):
        convert(ConvertConfig(pickled, tmp_path / "net.pt", dtype="float16"))
