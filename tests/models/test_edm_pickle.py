"""Pickles of EDM networks are read exactly; files that are something else, or lack something, are named as such."""

import io
import math
import pickle
import struct

import edm_files
import numpy as np
import pytest
import torch
from edm_files import NUMPY_SCALAR, EasyDict, Persistent, Reduced, Tiny, dumps, refused, tiny, with_parameter, write
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gdd_fast.errors import UnsafePickleError, WeightsError
from gdd_fast.models.files.pickle_machine import Machine, Reader
from gdd_fast.models.files.pickle_reader import load

# Reading


@pytest.mark.parametrize("protocol", [4, 5])
def test_round_trip(tmp_path, protocol):
    module = Tiny()
    networks = load(write(tmp_path / "net.pkl", {"ema": tiny(module)}, protocol))
    assert list(networks) == ["ema"]
    network, expected = networks["ema"], module.state_dict()
    assert network.class_name == "EDMPrecond"
    assert network.init_kwargs == edm_files.TINY_ARGUMENTS
    assert list(network.state_dict) == list(expected)
    for name, tensor in network.state_dict.items():
        assert tensor.dtype == expected[name].dtype and tensor.is_contiguous() and not tensor.requires_grad
        assert torch.equal(tensor, expected[name])


def test_training_snapshot(tmp_path):
    """The other things in a snapshot are read past, including an augmentation pipe, a module without parameters."""
    pipe = nn.Module()
    pipe.register_buffer("p", torch.tensor(0.12))
    pipe.register_buffer("bank", torch.ones(2, 3))
    ema, net = Tiny(), Tiny()
    nn.init.zeros_(net.out.weight)
    content = {
        "ema": tiny(ema),
        "net": tiny(net, class_name="GDDPrecond"),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}}),
        "augment_pipe": edm_files.network(pipe, "AugmentPipe", {"p": 0.12}),
        "dataset_kwargs": EasyDict(path="cifar10.zip", use_labels=True, max_size=None),
        "nothing": None,
    }
    networks = load(write(tmp_path / "snapshot.pkl", content))
    assert list(networks) == ["ema", "net"]
    assert networks["net"].class_name == "GDDPrecond"
    assert torch.equal(networks["ema"].state_dict["out.weight"], ema.out.weight)
    assert not networks["net"].state_dict["out.weight"].any()


def test_source_in_the_file_is_not_run(tmp_path, canary):
    source = f"open({str(canary)!r}, 'w').close()"
    path = write(tmp_path / "net.pkl", {"ema": tiny(module_src=source)})
    load(path)
    assert not canary.exists()
    with edm_files.importable():  # what pickle.load does with the same file
        pickle.loads(path.read_bytes())
    canary.unlink()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parameter_types(tmp_path, dtype):
    module = Tiny().to(dtype)
    state = load(write(tmp_path / "net.pkl", {"ema": tiny(module)}))["ema"].state_dict
    assert state["out.weight"].dtype == dtype and torch.equal(state["out.weight"], module.out.weight)
    assert state["model.8x8_norm.num_batches_tracked"].dtype == torch.int64


def test_booleans_are_0_or_1(tmp_path):
    """Whatever bytes are stored; a torch.bool that holds another one is neither true nor false."""
    module = nn.Linear(1, 1)
    module.register_buffer("mask", torch.tensor([False, True, True, True]))
    content = dumps({"ema": tiny(module)})
    assert content.count(struct.pack("<q4B", 4, 0, 1, 1, 1)) == 1
    content = content.replace(struct.pack("<q4B", 4, 0, 1, 1, 1), struct.pack("<q4B", 4, 0, 2, 255, 7))
    mask = load(write(tmp_path / "net.pkl", content))["ema"].state_dict["mask"]
    assert mask.dtype == torch.bool and mask.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_views_become_tensors_of_their_own(tmp_path):
    """Tied, transposed, sliced, permuted and empty parameters come out contiguous and share no memory."""
    module, base = nn.Module(), torch.arange(24.0)
    views = {
        "tied": base.view(4, 6),
        "transposed": base.view(4, 6).t(),
        "sliced": base[5:17:3],
        "permuted": base.view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "scalar": base[7],
    }
    for name, view in views.items():
        module.register_parameter(name, nn.Parameter(view))
    state = load(write(tmp_path / "net.pkl", {"ema": tiny(module)}))["ema"].state_dict
    for name, view in views.items():
        assert torch.equal(state[name], view) and state[name].is_contiguous(), name
        assert state[name].data_ptr() % state[name].element_size() == 0, "still where it was in the file"
    memory = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(0.5), np.int64(-7), np.bool_(True), np.dtype(">i4").type(5), math.inf]
)
def test_numpy_settings_become_plain(tmp_path, value):
    network = edm_files.network(Tiny(), "EDMPrecond", {"value": value, "list": (value, [value])})
    kwargs = load(write(tmp_path / "net.pkl", {"ema": network}))["ema"].init_kwargs
    plain = getattr(value, "item", lambda: value)()
    assert kwargs == {"value": plain, "list": [plain, [plain]]}
    assert type(kwargs["value"]) is type(plain)


def test_numpy_settings_of_either_byte_order(tmp_path):
    values = [Reduced(NUMPY_SCALAR, np.dtype(">i4"), b"\0\0\1\2")]
    network = edm_files.network(Tiny(), "EDMPrecond", {"values": values})
    assert load(write(tmp_path / "net.pkl", {"ema": network}))["ema"].init_kwargs == {"values": [258]}


def test_settings_given_by_position(tmp_path):
    network = edm_files.network(Tiny(), "EDMPrecond", {"label_dim": 10}, init_args=(32, 3))
    kwargs = load(write(tmp_path / "net.pkl", {"ema": network}))["ema"].init_kwargs
    assert kwargs == {"img_resolution": 32, "img_channels": 3, "label_dim": 10}
    refused(tmp_path, {"ema": edm_files.network(Tiny(), "Other", {}, init_args=(32,))}, "names are not known")
    network = edm_files.network(Tiny(), "EDMPrecond", {"img_resolution": 32}, init_args=(32, 3))
    refused(tmp_path, {"ema": network}, "img_resolution")


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**126), 2**126) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**31), 2**31 - 1), inner)
    ),
)


@given(plain_data, st.sampled_from([2, 3, 4, 5]))
def test_machine_agrees_with_pickle(data, protocol):
    pickled = pickle.dumps([data, data], protocol)
    reader = Reader(memoryview(pickled + b"rest"))
    assert repr(Machine(reader, {}).load()) == repr([data, data])
    assert reader.remaining == 4


# Files that are something else


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"(dp0\n.", "not a pickle"),
        (b"\x89PNG\r\n", "not a pickle"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({}), "no network; it holds nothing"),
        (pickle.dumps({"ema": 3, "net": None}), r"no network; it holds 'ema' \(int\), 'net' \(NoneType\)"),
        (pickle.dumps({5: "five"}), "holds a dict"),
        (b"\x80", "not a pickle"),
        (b"\x80\x63.", "protocol 99"),
        (pickle.dumps({}, 2), "protocol 2"),
        (pickle.dumps({}, 3), "protocol 3"),
    ],
)
def test_other_files(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_torch_save_files(tmp_path):
    for zipped, match in ((True, "zip archive"), (False, "old torch.save checkpoints")):
        file = io.BytesIO()
        torch.save(Tiny().state_dict(), file, _use_new_zipfile_serialization=zipped)
        refused(tmp_path, file.getvalue(), match)


def test_top_level_is_a_network(tmp_path):
    refused(tmp_path, dumps(tiny()), "holds a EDMPrecond; a network pickle holds a dict")


def test_missing_and_large_files(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load(tmp_path / "absent.pkl")
    with pytest.raises(WeightsError, match="no such file"):
        load(tmp_path)
    path = write(tmp_path / "net.pkl", {"ema": tiny()})
    with pytest.raises(WeightsError, match="more than"):
        load(path, max_bytes=1000)


# Files that lack something


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"version": 5}, "persistence version"),
        ({"version": True}, "persistence version"),
        ({"type": "function"}, "lacks"),
        ({"class_name": None}, "lacks"),
        ({"class_name": "os; x"}, "class name"),
        ({"state": [1]}, "lacks"),
    ],
)
def test_wrong_meta(tmp_path, meta, match):
    network = tiny()
    network.meta.update(meta)
    refused(tmp_path, {"ema": network}, match)


@pytest.mark.parametrize("key", ["type", "version", "class_name", "state"])
def test_missing_meta(tmp_path, key):
    network = tiny()
    del network.meta[key]
    refused(tmp_path, {"ema": network}, "lacks")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("_parameters", None, "no dict _parameters"),
        ("_buffers", [1], "no dict _buffers"),
        ("_buffers", {"a": 3}, "'a' is a int, not a tensor"),
        ("_buffers", {"a.b": torch.ones(1)}, "bad name in _buffers"),
        ("_buffers", {5: torch.ones(1)}, "bad name in _buffers"),
        ("_modules", {"child": 3}, "module 'child' is a int"),
        ("_modules", {"out": torch.ones(1)}, "module 'out' is a tensor"),
        ("_non_persistent_buffers_set", [], "_non_persistent_buffers_set"),
        ("_init_kwargs", None, "without its constructor's arguments"),
        ("_init_args", None, "without its constructor's arguments"),
        ("_init_kwargs", {3: 4}, "constructor argument"),
        ("_init_kwargs", {"a": b"bytes"}, "'a' holds a bytes"),
        ("_init_kwargs", {"a": torch.ones(1)}, "'a' holds a tensor"),
        ("_init_kwargs", {"a": {1: 2}}, "'a' holds a dict"),
    ],
)
def test_wrong_state(tmp_path, name, value, match):
    network = tiny()
    network.meta["state"][name] = value
    refused(tmp_path, {"ema": network}, match)


def test_parameter_that_is_not_floating_point(tmp_path):
    content = with_parameter(nn.Parameter(torch.ones(2, 3, dtype=torch.int64), requires_grad=False))
    refused(tmp_path, content, r"parameter 'out.weight' has dtype torch.int64")


def test_parameter_and_buffer_of_one_name(tmp_path):
    network = tiny()
    network.meta["state"]["_modules"]["out"].meta["state"]["_buffers"] = {"weight": torch.ones(1)}
    refused(tmp_path, {"ema": network}, "'out.weight' occurs twice")


def test_truncated_at_any_byte(tmp_path):
    content = dumps({"ema": tiny()})
    path = tmp_path / "cut.pkl"
    for length in (*range(40), *range(40, len(content), 37)):
        path.write_bytes(content[:length])
        with pytest.raises(UnsafePickleError):
            load(path)
