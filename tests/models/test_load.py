"""Networks on disk and from pickles: to the bit and back, and one clear error for everything that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from edm_reference import SIZE, SMALL, fill, inputs
from safetensors.torch import load_file, save_file

from gdd_fast.errors import ConfigError, GddFastError, WeightsError
from gdd_fast.models.files import load
from gdd_fast.models.files.load import as_generator, load_generator, load_network, network_from_pickle
from gdd_fast.models.files.pickle_reader import PickledNetwork
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import EDMPrecond, GDDPrecond

NAME = "ncsnpp"
CONFIG = SMALL[NAME]  # unconditional, with an augmentation layer
AUGMENT = "model.map_augment.weight"
# Each took minutes, or ended in a RuntimeError or OverflowError of PyTorch's.
HUGE = (
    {"num_blocks": 3000},
    {"model_channels": 2**40},
    {"channel_mult": [2**30]},
    {"channel_mult_emb": 2**40},
    {"img_channels": 2**62},
    {"label_dim": 2**62},
    {"augment_dim": 2**62},
    {"sigma_data": 10**400},
)


@pytest.fixture(scope="module")
def net() -> EDMPrecond:
    return fill(EDMPrecond(SIZE, 3, **CONFIG, sigma_min=0.002))


@pytest.fixture
def folder(net: EDMPrecond, tmp_path: Path) -> Path:
    save_network(net, tmp_path / "net")
    return tmp_path / "net"


def pickled(net: EDMPrecond, class_name: str = "EDMPrecond", **changes: object) -> PickledNetwork:
    init = {"img_resolution": SIZE, "img_channels": 3, "label_dim": 0, "use_fp16": True, **CONFIG, **changes}
    return PickledNetwork(class_name, init, net.state_dict())


def assert_same(a: EDMPrecond, b: EDMPrecond) -> None:
    assert type(a) is type(b) and a.init_config() == b.init_config()
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("cls", [EDMPrecond, GDDPrecond])
@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_round_trip_is_exact(cls: type[EDMPrecond], name: str, tmp_path: Path) -> None:
    net = fill(cls(SIZE, 3, **SMALL[name]))
    save_network(net, tmp_path)
    loaded = load_network(tmp_path, device="cpu")
    assert_same(loaded, net)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs(SMALL[name])), net(**inputs(SMALL[name])))


def test_a_saved_folder_holds_two_readable_files(net: EDMPrecond, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"format": "gdd_fast.network", "version": 1, "precond": "edm", "init": net.init_config()}
    assert set(load_file(folder / "model.safetensors")) == set(net.state_dict())


def test_half_precision_storage_loads_as_float32(net: EDMPrecond, tmp_path: Path) -> None:
    save_network(net, tmp_path, dtype=torch.float16)
    loaded = load_network(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    parameters = dict(net.named_parameters())
    for name, tensor in net.state_dict().items():
        expected = tensor.half().float() if name in parameters else tensor  # frequencies are kept as they are
        assert torch.equal(loaded.state_dict()[name], expected)


def test_channels_last_networks_are_saved_alike(net: EDMPrecond, tmp_path: Path) -> None:
    twin = load._rebuild(net, EDMPrecond).to(memory_format=torch.channels_last)
    save_network(twin, tmp_path)
    assert_same(load_network(tmp_path), net)


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    state = torch.get_rng_state()
    load_network(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_over_another_network_never_mixes_the_two(
    net: EDMPrecond, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    other = EDMPrecond(SIZE, 3, **SMALL["adm"])
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_network(net, folder)
        assert_same(load_network(folder), net)  # the same network: what was there is untouched
        with pytest.raises(KeyboardInterrupt):
            save_network(other, folder)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_network(folder)
    save_network(other, folder)
    assert_same(load_network(folder), other)


def test_only_preconditioned_networks_are_saved(net: EDMPrecond, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only EDMPrecond, GDDPrecond, UNet2DPrecond can be saved"):
        save_network(net.model, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not have the format"),
        ({"version": 2}, "version 2, .* update gdd_fast"),
        ({"extra": 1}, "unknown keys extra"),
        ({"precond": "vp"}, "'precond' must be one of edm, gdd, unet2d, got 'vp'"),
        ({"precond": ["edm"]}, "'precond' must be one of"),
        ({"init": None}, "'init'"),
        ({"init": {"img_resolution": 16}}, "img_channels"),
        ({"init": {"img_resolution": 16, "img_channels": 3, "model_type": "Net"}}, "model_type"),
        ({"init": {"img_resolution": 16, "img_channels": 3, "blocks": 3}}, "no argument blocks"),
        ({"init": {"img_resolution": 16, "img_channels": 3, "channel_mult": "wide"}}, "channel_mult"),
        ({"init": {"img_resolution": 16, "img_channels": 3, "model_channels": [64]}}, "model_channels"),
        *(
            ({"init": {"img_resolution": 16, "img_channels": 3} | huge}, next(iter(huge)).removeprefix("img_"))
            for huge in HUGE
        ),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(WeightsError, match=message):
        load_network(folder)


def test_configurations_that_are_not_json(folder: Path) -> None:
    for text in ("{", "[]", "", "\xff", "[" * 200_000):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(WeightsError, match=r"config\.json"):
            load_network(folder)


def test_weights_that_do_not_fit(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    names = list(state)
    state["model.extra"] = torch.zeros(1)
    removed = names[0]
    del state[removed]
    state[names[1]] = torch.zeros(1, 2)
    state[names[2]] = torch.zeros(state[names[2]].shape, dtype=torch.int32)
    save_file(state, path)
    with pytest.raises(WeightsError) as caught:
        load_network(folder)
    for part in (f"{removed} is missing", "model.extra is not part", f"{names[1]} is (1, 2), not", "torch.int32"):
        assert part in str(caught.value)


def test_only_the_first_misfits_are_listed(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"; and \d+ more\.$") as caught:
        load_network(folder)
    assert len(str(caught.value)) < 1000


def test_a_filter_other_than_the_configured_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("resample_filter"))
    state[name] = torch.rand_like(state[name])
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"is not the filter \[1, 3, 3, 1\]"):
        load_network(folder)


def test_damaged_and_missing_files(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:1000], whole[:-1], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="damaged"):
            load_network(folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_network(folder)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_network(tmp_path / "nowhere")


@pytest.mark.parametrize("drop", [False, True])
def test_from_pickle(net: EDMPrecond, drop: bool) -> None:
    loaded = network_from_pickle(pickled(net), drop_augment=drop, dtype=torch.bfloat16)
    assert type(loaded) is EDMPrecond and loaded.dtype == torch.bfloat16
    expected = {n: t for n, t in net.state_dict().items() if not (drop and n == AUGMENT)}
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in expected.items())
    assert (loaded.model.map_augment is None) == drop


def test_from_pickle_owns_its_weights(net: EDMPrecond) -> None:
    source = pickled(net)
    a, b = network_from_pickle(source), network_from_pickle(source)
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.zero_()
    assert_same(b, network_from_pickle(pickled(net)))


@pytest.mark.parametrize("class_name", ["GDDPrecond", "D2OPrecond"])
def test_from_pickle_of_a_gdd_generator(net: EDMPrecond, class_name: str) -> None:
    """GDD's files may still name an augmentation layer that their weights lack."""
    source = pickled(net, class_name)
    del source.state_dict[AUGMENT]
    loaded = network_from_pickle(source, drop_augment=True)
    assert type(loaded) is GDDPrecond and loaded.sigma_eps == 0.002
    with pytest.raises(WeightsError, match=f"{AUGMENT} is missing"):
        network_from_pickle(source)


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond", "SongUNet", ""])
def test_from_pickle_of_another_class(net: EDMPrecond, name: str) -> None:
    with pytest.raises(WeightsError, match="only EDMPrecond, GDDPrecond, D2OPrecond"):
        network_from_pickle(pickled(net, name))


@pytest.mark.parametrize(
    "changes", [{"new_option": 1}, {"model_type": "dict"}, {"model_channels": 64}, {"img_channels": 1}, *HUGE]
)
def test_from_pickle_with_arguments_that_do_not_fit(net: EDMPrecond, changes: dict) -> None:
    with pytest.raises(WeightsError, match="the pickle"):
        network_from_pickle(pickled(net, **changes))


def test_as_generator_keeps_the_weights_and_drops_the_rest(net: EDMPrecond) -> None:
    teacher = load._rebuild(net, EDMPrecond, dropout=0.3)
    generator = as_generator(teacher)
    assert type(generator) is GDDPrecond and generator.sigma_eps == 0.002 and generator.training
    assert generator.model.map_augment is None and generator.sigma_min == 0.002
    assert generator.model.enc["16x16_block0"].dropout == 0
    expected = {n: t for n, t in teacher.state_dict().items() if n != AUGMENT}
    assert generator.state_dict().keys() == expected.keys()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1)
    assert all(torch.equal(teacher.state_dict()[n], net.state_dict()[n]) for n in expected)


def test_load_generator_from_folder_and_run(net: EDMPrecond, folder: Path, tmp_path: Path) -> None:
    generator = as_generator(net)
    save_network(generator, tmp_path / "run" / "generator_ema")
    loaded = load_generator(tmp_path / "run", device="cpu", dtype="bfloat16")
    assert type(loaded) is GDDPrecond and loaded.dtype == torch.bfloat16
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)

    teacher = load_generator(folder)
    assert type(teacher) is EDMPrecond and teacher.model.map_augment is None
    call = inputs(CONFIG) | {"augment_labels": None}
    with torch.no_grad():
        assert torch.equal(teacher(**call), net.requires_grad_(False)(**call))


def test_load_generator_from_pickle(net: EDMPrecond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.pkl"
    path.touch()
    monkeypatch.setattr(load.pickle_reader, "load", lambda _: {"ema": pickled(net)})
    assert load_generator(path).model.map_augment is None
    monkeypatch.setattr(load.pickle_reader, "load", lambda _: {"net": pickled(net)})
    with pytest.raises(WeightsError, match="no 'ema' network, only net"):
        load_generator(path)


def test_load_generator_of_something_else(folder: Path, tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "nowhere.pkl", "does not exist"),
        (folder / "config.json", "is not a network"),
        (tmp_path, r"no config\.json"),
    ]:
        with pytest.raises(WeightsError, match=message):
            load_generator(path)
    with pytest.raises(GddFastError, match="dtype must be one of"):
        load_generator(folder, dtype="int8")
