"""Pickles of EDM networks are read exactly, and nothing that a file holds is ever run."""

import collections
import io
import math
import os
import pickle
import random
import struct
import sys

import edm_files
import numpy as np
import pytest
import torch
from edm_files import EasyDict, Persistent, Reduced, Tiny, dumps, tiny, write
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gdd_fast.errors import GddFastError, UnsafePickleError, WeightsError
from gdd_fast.interop import _pickle_machine, edm_pickle
from gdd_fast.interop._pickle_machine import Machine, Reader
from gdd_fast.interop.edm_pickle import load

NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # numpy.core.multiarray.scalar, wherever this NumPy has it


@pytest.fixture
def canary(tmp_path):
    """A path that whatever the file smuggles in creates when it runs; the test fails if it did."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def refused(tmp_path, content, match: str) -> None:
    path = write(tmp_path / "refused.pkl", content)
    with pytest.raises(UnsafePickleError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def with_parameter(value: object) -> dict:
    """A network with `value` in the place of the parameter out.weight."""
    network = tiny()
    network.meta["state"]["_modules"]["out"].meta["state"]["_parameters"]["weight"] = value
    return {"ema": network}


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


# Files that attack


def literal(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """A pickle that calls `function` (opcodes that push it) with `arguments` (likewise)."""
    return b"\x80\x04" + function + b"(" + b"".join(arguments) + b"tR."


def stack_global(module: str, name: str) -> bytes:
    return literal(module) + literal(name) + b"\x93"


def text_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize("opcode", [stack_global, text_global])
@pytest.mark.parametrize(
    "function",
    [
        "os.system",
        "posix.system",
        "posix.open",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.open",
        "builtins.getattr",
        "builtins.__import__",
        "builtins.set",
        "__builtin__.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "functools.partial",
        "functools.reduce",
        "importlib.import_module",
        "pickle.loads",
        "_pickle.loads",
        "codecs.decode",
        "_codecs.encode",
        "copyreg._reconstructor",
        "types.CodeType",
        "torch.load",
        "torch.jit.load",
        "torch.storage.UntypedStorage",
        "torch.FloatStorage",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_wrapper_subclass",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.container.ModuleDict.__init__",
        "numpy.load",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.dtype.__class__",
        "collections.OrderedDict.fromkeys",
        "dnnlib.util.open_url",
        "dnnlib.util.call_func_by_name",
        "torch_utils.persistence._src_to_module",
        "gdd_fast.interop.edm_pickle.load",
    ],
)
def test_refused_globals(tmp_path, canary, function, opcode):
    module, name = function.rsplit(".", 1)
    content = call(opcode(module, name), literal(str(canary)), literal("w"))
    refused(tmp_path, content, f"asks for {function},")


def test_refused_inside_a_network(tmp_path, canary):
    for payload in (Reduced(os.mkdir, str(canary)), Reduced(eval, f"open({str(canary)!r}, 'w')")):
        for content in (
            with_parameter(payload),
            {"ema": tiny(), "loss_fn": payload},
            {"ema": edm_files.network(Tiny(), "EDMPrecond", {"a": [payload]})},
        ):
            refused(tmp_path, content, "asks for (posix.mkdir|builtins.eval)")


def test_names_in_messages_are_printable(tmp_path):
    refused(tmp_path, call(stack_global("os\x1b[2J", "x\u202e")), r"asks for 'os\\x1b\[2J.x\\u202e'")
    refused(tmp_path, call(stack_global("a" * 255, "b" * 255)), "asks for 'a{200}'")


def storage_of(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


def legacy_save(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def header(**machine) -> bytes:
    """The first three of the pickles a storage consists of."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, machine))


def zip_save(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


NESTED = {
    "pickle": (pickle.dumps, "asks for posix.mkdir"),
    "legacy": (legacy_save, "asks for posix.mkdir"),
    "legacy list": (lambda payload: legacy_save([torch.ones(2), payload]), "asks for collections.OrderedDict|torch"),
    "zip": (zip_save, "not in the format"),
    "header and pickle": (
        lambda payload: header(little_endian=True) + pickle.dumps(payload, 2),
        "asks for posix.mkdir",
    ),
    "header alone": (lambda payload: header(little_endian=True), "too early"),
    "big-endian": (lambda payload: header(little_endian=False), "big-endian"),
    "tensor": (lambda payload: legacy_save(torch.ones(4)), "asks for torch._utils._rebuild_tensor_v2"),
    "text": (lambda payload: b"not a storage", "pickle has"),
    "nothing": (lambda payload: b"", "too early"),
}


@pytest.mark.parametrize("kind", list(NESTED))
def test_nested_payloads(tmp_path, canary, kind):
    make, match = NESTED[kind]
    storage = Reduced(torch.storage._load_from_bytes, make(Reduced(os.mkdir, str(canary))))
    tensor = Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (4,), (1,), False, collections.OrderedDict())
    refused(tmp_path, with_parameter(tensor), match)


def test_nested_payload_would_run(tmp_path):
    """The payloads above do their work when they are loaded the ordinary way: the test before this one can fail."""
    made = tmp_path / "made"
    for kind in ("legacy", "zip"):
        torch.load(io.BytesIO(NESTED[kind][0](Reduced(os.mkdir, str(made)))), weights_only=False)
        made.rmdir()


def test_objects_in_numpy_values(tmp_path, canary):
    array = np.array([Reduced(os.mkdir, str(canary))], dtype=object)
    refused(tmp_path, with_parameter(array), "multiarray._reconstruct")
    for kind in (Reduced(np.dtype, "O", False, True), np.dtype("M8[s]"), np.dtype([("a", "f8")]), np.dtype("U4")):
        refused(tmp_path, with_parameter(Reduced(NUMPY_SCALAR, kind, b"12345678")), "numpy.dtype|not a plain number")
    refused(tmp_path, with_parameter(Reduced(NUMPY_SCALAR, np.dtype("f8"), b"1234")), "not a plain number")


@pytest.mark.parametrize("state", [b"}", b"}" + literal("x") + b"K\x01s", b"N}" + literal("make") + b"Ns\x86"])
@pytest.mark.parametrize(
    "target",
    [
        literal("collections") + literal("OrderedDict") + b"\x93",
        literal("torch_utils.persistence") + literal("_reconstruct_persistent_obj") + b"\x93",
        b"]",
        b"}",
        b"K\x01",
        literal("text"),
    ],
)
def test_build_reaches_nothing(tmp_path, target, state):
    """BUILD sets attributes; neither the stand-ins of globals nor ordinary values have any to set."""
    refused(tmp_path, b"\x80\x04" + target + state + b"b.", "where a StandIn belongs")


def test_build_of_a_module_takes_only_a_dict_once(tmp_path):
    module = literal("torch.nn.modules.container") + literal("ModuleDict") + b"\x93)\x81"
    refused(tmp_path, b"\x80\x04" + module + b"N}" + literal("build") + b"Ns\x86b.", "not a dict")
    once = b"}" + literal("a") + b"K\x01sb"
    refused(tmp_path, b"\x80\x04" + module + once + once + b".", "state twice")


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (b"P1\n.", "opcode PERSID"),
        (b"K\x01Q.", "opcode BINPERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x83\x01\x00.", "opcode EXT2"),
        (b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"(N" + literal("true") + b"o.", "opcode OBJ"),
        (b"N)}\x92.", "opcode NEWOBJ_EX"),
        (b"\x97.", "opcode NEXT_BUFFER"),
        (b"]2.", "opcode DUP"),
        (b"]0.", "opcode POP"),
        (b"I1\n.", "opcode INT"),
        (b"\xff.", "byte 0xff"),
        (b"\x8a\xff" + bytes(255) + b".", "an integer of 255 bytes"),
        (b"]]s.", "operation without its operand"),
        (b"]NNs.", "a list where a dict belongs"),
        (b"}Na.", "a dict where a list belongs"),
        (b"}]K\x01s.", "a list as a key"),
        (b"})K\x01s.", "a tuple as a key"),
        (b"}\x8a\x08" + b"\xff" * 7 + b"\x7fK\x01s.", "a int as a key"),
        (b"}(K\x01u.", "dict item without its value"),
        (b"\x8f(]\x90.", "a list as a key"),
        (b"h\x05.", "a reference to value 5"),
        (b"\x94.", "operation without its operand"),
        (b"t.", "operation without its MARK"),
        (b"N(\x85.", "operation without its operand"),
        (b"}(.", "STOP with an unfinished value"),
        (b"}}.", "STOP with an unfinished value"),
        (b".", "STOP with an unfinished value"),
        (b"]]\x93.", "a list where a str belongs"),
        (b"]]R.", "a list where a tuple belongs"),
        (b"))R.", "a tuple where a Constructor belongs"),
        (b"X\x02\x00\x00\x00\xff\xff.", "not UTF-8"),
        (b"c" + b"a" * 300, "a name without an end"),
        (b"\x8d" + b"\xff" * 8 + b".", "ends too early"),
        (b"\x8e" + b"\xff" * 8 + b".", "ends too early"),
        (b"B\xff\xff\xff\xff.", "ends too early"),
        (b"\x8b\xff\xff\xff\xff.", "ends too early"),
    ],
)
def test_refused_opcodes(tmp_path, opcodes, match):
    refused(tmp_path, b"\x80\x04" + opcodes, match)


# Files that would exhaust the machine


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
        tmp_path, with_parameter(rebuilt(size, stride, offset)), "does not fit|integers >= 0|sizes and|wrong arguments"
    )


def test_tensors_inside_their_storage(tmp_path):
    state = load(write(tmp_path / "net.pkl", with_parameter(rebuilt((2, 3), (1, 2)))))["ema"].state_dict
    assert state["out.weight"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_storage_that_lies_about_its_size(tmp_path):
    content = dumps(with_parameter(rebuilt((6,), (1,))))
    data = struct.pack("<q6f", 6, *range(6))
    assert content.count(data) == 1
    refused(tmp_path, content.replace(data, struct.pack("<q6f", 7, *range(6))), "announces 6 elements")
    refused(tmp_path, content.replace(data, struct.pack("<q6f", -1, *range(6))), "announces 6 elements")


def test_one_storage_as_many_parameters(tmp_path):
    """Views of one storage may not unfold into far more than the file."""
    network, storage = tiny(), storage_of(torch.zeros(50_000))
    for index in range(200):
        view = Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (50_000,), (1,), False, collections.OrderedDict())
        network.meta["state"]["_buffers"][f"b{index}"] = view
    path = write(tmp_path / "net.pkl", {"ema": network})
    assert path.stat().st_size < 250_000
    refused(tmp_path, path.read_bytes(), "too many tensor bytes")


def test_shared_modules_do_not_unfold(tmp_path):
    """Thirty levels that each hold the one below twice are 2^30 modules and a small file."""
    leaf = nn.Module()
    leaf.register_parameter("weight", nn.Parameter(torch.empty(0)))
    module = edm_files.network(leaf, "Leaf", {})
    for _ in range(30):
        outer = edm_files.network(nn.Module(), "Block", {})
        outer.meta["state"]["_modules"] = {"a": module, "b": module}
        module = outer
    refused(tmp_path, {"ema": module}, "too many (modules|tensors)")


def test_circular_modules(tmp_path):
    network = tiny()
    again = Persistent("EDMPrecond", network.meta["state"])
    network.meta["state"]["_modules"] = {"a": again}
    network.meta["state"]["_parameters"] = {}
    refused(tmp_path, {"ema": network}, "nested more than")


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


# Files that are damaged at random


def test_mutations(tmp_path, canary):
    """Whatever bytes change, the file is read or refused with the library's own error, and runs nothing."""
    source = f"open({str(canary)!r}, 'w').close()"
    original = dumps({"ema": tiny(module_src=source), "loss_fn": Persistent("L", {"payload": 1}, source)})
    path, draw = tmp_path / "mutated.pkl", random.Random(0)
    refusals = 0
    for _ in range(800):
        content = bytearray(original)
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            place = draw.randrange(len(content))
            match draw.randrange(4):
                case 0:
                    content[place] = draw.randrange(256)
                case 1:
                    content[place] ^= 1 << draw.randrange(8)
                case 2:
                    del content[place : place + draw.randrange(1, 40)]
                case 3:
                    other = draw.randrange(len(content))
                    content[place:place] = content[other : other + draw.randrange(1, 40)]
        path.write_bytes(content)
        try:
            for network in load(path).values():
                assert all(tensor.numel() < len(content) for tensor in network.state_dict.values())
        except GddFastError:
            refusals += 1
    assert 200 < refusals < 800


def test_nothing_is_left_behind(tmp_path):
    """Refused or read, a file changes nothing in the process: no module imported, no stand-in altered."""
    path = write(tmp_path / "net.pkl", {"ema": tiny()})
    before, names = set(sys.modules), dict(edm_pickle._GLOBALS)
    load(path)
    refused(tmp_path, call(stack_global("antigravity", "geohash")), "asks for antigravity.geohash")
    assert set(sys.modules) == before and names == edm_pickle._GLOBALS
