"""A small pickle cannot unfold into more than its own size: tensors, modules, settings, nesting, time."""

import collections
import struct

import edm_files
import pytest
import torch
from edm_files import Persistent, Reduced, Tiny, dumps, literal, refused, storage_of, tiny, with_parameter, write
from torch import nn

from gdd_fast.models.files import pickle_globals
from gdd_fast.models.files import pickle_machine as _pickle_machine
from gdd_fast.models.files.pickle_reader import load


def rebuilt(size, stride, offset=0):
    """A tensor of six elements as the file would describe it."""
    storage = storage_of(torch.arange(6.0))
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**12,), (0,), 0),
        ((10**6, 10**6), (0, 0), 0),
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((2,), (10**9,), 0),
        ((6,), (1,), -1),
        ((-6,), (1,), 0),
        ((6,), (-1,), 5),
        ((2**63, 2**63), (1, 1), 0),
        ((2**61, 2**61, 2**61, 0), (1, 1, 1, 1), 0),
        ((6.0,), (1,), 0),
        ((True,), (1,), 0),
        ((6,), (1, 1), 0),
        ((1,) * 9, (1,) * 9, 0),
        ([6], [1], 0),
        ((), (), 6),
    ],
)
def test_tensors_outside_their_storage(tmp_path, size, stride, offset):
    refused(
        tmp_path,
        with_parameter(rebuilt(size, stride, offset)),
        "does not fit|integers >= 0|sizes and|wrong arguments|larger than",
    )


def test_tensors_inside_their_storage(tmp_path):
    state = load(write(tmp_path / "net.pkl", with_parameter(rebuilt((2, 3), (1, 2)))))["ema"].state_dict
    assert state["out.weight"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_sizes_of_one_and_of_nothing(tmp_path):
    """Strides that no element is at may be anything."""
    state = load(write(tmp_path / "net.pkl", with_parameter(rebuilt((1, 2), (2**61, 5)))))["ema"].state_dict
    assert state["out.weight"].tolist() == [[0, 5]]
    state = load(write(tmp_path / "net.pkl", with_parameter(rebuilt((2**20, 0), (2**61, 2**61)))))["ema"].state_dict
    assert state["out.weight"].shape == (2**20, 0)


def test_far_apart_elements_of_a_large_storage(tmp_path, monkeypatch):
    """Two elements at the ends of a storage are two elements of memory, however many parameters ask for them."""
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **options: copied.append(x.numel()) or clone(x, **options))
    network, storage = tiny(), storage_of(torch.arange(100_000.0))
    for index in range(50):
        view = Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (99_999,), False, collections.OrderedDict())
        network.meta["state"]["_buffers"][f"b{index}"] = view
    state = load(write(tmp_path / "net.pkl", {"ema": network}))["ema"].state_dict
    assert all(state[f"b{index}"].tolist() == [0, 99_999] for index in range(50))
    assert 50 * 8 <= sum(copied) < 2000


def test_the_bytes_of_a_storage_are_read_once(tmp_path, monkeypatch):
    """They may hold a long pickle of their own, and be referred to any number of times."""
    reads = []
    load_one = _pickle_machine.Machine.load
    monkeypatch.setattr(_pickle_machine.Machine, "load", lambda machine: reads.append(machine) or load_one(machine))
    data = storage_of(torch.arange(6.0)).__reduce__()[1][0]
    network = tiny()
    calls = [Reduced(torch.storage._load_from_bytes, data) for _ in range(500)]
    path = write(tmp_path / "net.pkl", {"ema": network, "other": calls})
    assert path.stat().st_size < 20_000
    assert list(load(path)) == ["ema"]
    assert len(reads) < 100


def test_storage_that_lies_about_its_size(tmp_path):
    content = dumps(with_parameter(rebuilt((6,), (1,))))
    data = struct.pack("<q6f", 6, *range(6))
    assert content.count(data) == 1
    refused(tmp_path, content.replace(data, struct.pack("<q6f", 7, *range(6))), "claims 6 elements")
    refused(tmp_path, content.replace(data, struct.pack("<q6f", -1, *range(6))), "claims 6 elements")


def test_one_storage_as_many_parameters(tmp_path):
    """Views of one storage may not unfold into far more than the file."""
    network, storage = tiny(), storage_of(torch.zeros(50_000))
    for index in range(200):
        view = Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (50_000,), (1,), False, collections.OrderedDict())
        network.meta["state"]["_buffers"][f"b{index}"] = view
    path = write(tmp_path / "net.pkl", {"ema": network})
    assert path.stat().st_size < 250_000
    refused(tmp_path, path.read_bytes(), "too many tensor bytes")


def leaf() -> Persistent:
    """A module with one empty parameter."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.empty(0)))
    return edm_files.network(module, "Leaf", {})


def doubled(module: Persistent, levels: int) -> Persistent:
    """`levels` modules that each hold the one below twice."""
    for _ in range(levels):
        outer = edm_files.network(nn.Module(), "Block", {})
        outer.meta["state"]["_modules"] = {"a": module, "b": module}
        module = outer
    return module


def test_shared_modules_do_not_unfold(tmp_path):
    """Thirty levels that each hold the one below twice are 2^30 modules and a small file."""
    refused(tmp_path, {"ema": doubled(leaf(), 30)}, "too many (modules|tensors)")


def test_circular_modules(tmp_path):
    network = tiny()
    again = Persistent("EDMPrecond", network.meta["state"])
    network.meta["state"]["_modules"] = {"a": again}
    network.meta["state"]["_parameters"] = {}
    refused(tmp_path, {"ema": network}, "no network")
    network.meta["state"]["_parameters"] = {"weight": nn.Parameter(torch.empty(0))}
    refused(tmp_path, {"ema": network}, "nested more than")


def test_entries_without_parameters_are_searched_once(tmp_path, monkeypatch):
    """Many entries that share a tree of modules cost what one does."""
    visits = []
    members = pickle_globals.Module.members
    monkeypatch.setattr(pickle_globals.Module, "members", lambda *a: visits.append(a) or members(*a))
    tree = doubled(edm_files.network(nn.Module(), "Leaf", {}), 12)
    content = {f"key{index}": Persistent("Pipe", tree.meta["state"]) for index in range(200)}
    loaded = load(write(tmp_path / "net.pkl", content | {"ema": tiny()}))
    assert list(loaded) == ["ema"]
    assert len(visits) < 1000


def test_one_budget_for_all_entries(tmp_path):
    """Entries that share one network, or one dict, may together not unfold into more than one entry may."""
    tree = doubled(leaf(), 7)
    content = {f"key{index}": Persistent("EDMPrecond", tree.meta["state"]) for index in range(50)}
    assert list(load(write(tmp_path / "net.pkl", {"key0": content["key0"]}))) == ["key0"]
    refused(tmp_path, content, "too many modules")
    wide = tiny().meta["state"] | {"_parameters": {f"p{index}": None for index in range(2000)}}
    refused(tmp_path, {f"key{index}": Persistent("EDMPrecond", wide) for index in range(50)}, "too many members")


@pytest.mark.parametrize("length", [201, 10_000_000])
@pytest.mark.parametrize("where", ["_modules", "_parameters", "_buffers"])
def test_long_names(tmp_path, where, length):
    network, name = tiny(), "n" * length
    inner = edm_files.network(nn.Linear(1, 1), "Linear", {})
    network.meta["state"][where] = {name: inner if where == "_modules" else nn.Parameter(torch.ones(1))}
    refused(tmp_path, {"ema": network}, f"bad name in {where}")


def test_long_names_in_sum(tmp_path):
    network = edm_files.network(nn.Linear(1, 1), "Linear", {})
    for _ in range(5):
        outer = tiny()
        outer.meta["state"]["_modules"] = {"n" * 40: network}
        network = outer
    refused(tmp_path, {"ema": network}, "is longer than 200 characters")


@pytest.mark.parametrize("arguments", [{"n" * 201: 1}, {"a": "t" * 201}, {"a": {"n" * 201: 1}}])
def test_long_settings(tmp_path, arguments):
    refused(tmp_path, {"ema": edm_files.network(Tiny(), "EDMPrecond", arguments)}, "constructor argument")


def test_settings_do_not_unfold(tmp_path):
    laughs = "ha"
    for _ in range(25):
        laughs = [laughs] * 10
    refused(tmp_path, {"ema": edm_files.network(Tiny(), "EDMPrecond", {"a": laughs})}, "too many settings")
    circular = []
    circular.append(circular)
    refused(tmp_path, {"ema": edm_files.network(Tiny(), "EDMPrecond", {"a": circular})}, "nested more than")


@pytest.mark.parametrize("opening", [b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 100_000, b"(" * 100_000])
def test_deep_nesting(tmp_path, opening):
    refused(tmp_path, b"\x80\x04" + opening + b".", ".")
    refused(tmp_path, b"\x80\x04}" + literal("ema") + opening + b"s.", ".")


def test_deep_settings(tmp_path):
    content = dumps({"ema": edm_files.network(Tiny(), "EDMPrecond", {"a": "here"})})
    assert content.count(literal("here") + b"\x94") == 1
    deep = literal("here") + b"\x94" + b"\x85" * 100_000
    refused(tmp_path, content.replace(literal("here") + b"\x94", deep), "nested more than")


def test_endless_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(_pickle_machine, "MAX_OPERATIONS", 5000)
    refused(tmp_path, b"\x80\x04]" + b"Na" * 5000 + b".", "more than 5000 operations")
