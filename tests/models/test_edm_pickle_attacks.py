"""Nothing that a pickle holds is ever run, whatever it asks for and however it is damaged."""

import collections
import io
import os
import pickle
import random
import sys

import edm_files
import numpy as np
import pytest
import torch
from edm_files import NUMPY_SCALAR, Persistent, Reduced, Tiny, dumps, literal, refused, tiny, with_parameter, write

from gdd_fast.errors import GddFastError
from gdd_fast.models.files import pickle_globals
from gdd_fast.models.files.pickle_reader import load


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
        "gdd_fast.models.files.pickle_reader.load",
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
    "zip": (zip_save, "not in PyTorch's format"),
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
    before, names = set(sys.modules), dict(pickle_globals.GLOBALS)
    load(path)
    refused(tmp_path, call(stack_global("antigravity", "geohash")), "asks for antigravity.geohash")
    assert set(sys.modules) == before and names == pickle_globals.GLOBALS
