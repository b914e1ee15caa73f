"""A pickle reader that can build containers but call nothing.

`pickle.Unpickler` with a restricted `find_class` still lets a file reach into whatever `find_class` returns: BUILD sets
attributes of the stand-ins themselves, REDUCE calls them with any arguments, and persistent ids and extension codes are
further ways in. This machine knows only the opcodes that pickled EDM networks contain. A global is a token looked up in
a table, never an imported object; REDUCE and NEWOBJ accept only `Constructor` tokens and pass them a tuple to check;
BUILD accepts only `StandIn` objects. A file can ask for nothing else.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gdd_fast.errors import UnsafePickleError

MAX_OPERATIONS = 2_000_000  # the networks of EDM take tens of thousands
MAX_INTEGER_BITS = 128


@dataclass(frozen=True, slots=True)
class Constructor:
    """What a callable global of the file stands for: `make` checks the arguments and builds an inert value."""

    make: Callable[[tuple], object]


class StandIn:
    """A value that accepts BUILD. `build` checks the state; the state is never merged into the object's attributes."""

    __slots__ = ()

    def build(self, state: object) -> None:
        raise NotImplementedError


class Reader:
    """A position in a buffer. Reading past the end is an `UnsafePickleError`."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    @property
    def remaining(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= self.remaining:
            raise UnsafePickleError(
                f"the file ends too early: {count} bytes are announced at byte {self.position} and {self.remaining} "
                "are left; it is truncated or corrupt, get it again"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, limit: int = 256) -> str:
        """The text up to the next newline."""
        head = bytes(self.data[self.position : self.position + limit])
        end = head.find(b"\n")
        if end < 0:
            raise UnsafePickleError(f"the pickle has a name without an end at byte {self.position}; it is corrupt")
        self.position += end + 1
        return _text(head[:end])


class Machine:
    """Evaluates one pickle from `reader`, which is left positioned after its STOP.

    `names` maps "module.name" to what represents the global: a `Constructor` or any inert token. A global that is not
    in it is refused. `persistent` receives the value of a persistent id; without it, persistent ids are refused.
    Strings must be UTF-8; bytes become memoryviews of the file; dict keys and set members are strings or 32-bit
    integers.
    """

    def __init__(
        self,
        reader: Reader,
        names: Mapping[str, object],
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        self.reader = reader
        self.names = names
        self.persistent = persistent
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def load(self) -> object:
        for _ in range(MAX_OPERATIONS):
            opcode = self.reader.take(1)[0]
            if opcode == pickle.STOP[0]:
                if len(self.stack) != 1 or self.marks:
                    raise self.refusal("STOP with an unfinished value")
                return self.pop()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                known = pickletools.code2op.get(chr(opcode))  # type: ignore[attr-defined]
                raise self.refusal(f"opcode {known.name}" if known else f"byte 0x{opcode:02x}")
            operation(self)
        raise UnsafePickleError(
            f"the pickle has more than {MAX_OPERATIONS} operations; no EDM network is that complex, so it was refused"
        )

    def refusal(self, what: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"the pickle has {what} near byte {self.reader.position}, which a pickled EDM network never has; "
            "the file is corrupt or unsafe and was refused"
        )

    # The stack.

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, kind: type = object):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.refusal("an operation without its operand")
        value = self.stack.pop()
        if not isinstance(value, kind):
            raise self.refusal(f"a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def top(self, *kinds: type):
        value = self.pop()
        if not isinstance(value, kinds):
            raise self.refusal(f"a {type(value).__name__} where a {kinds[0].__name__} belongs")
        self.push(value)
        return value

    def pop_mark(self) -> list:
        if not self.marks:
            raise self.refusal("an operation without its MARK")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # The operations.

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def long(self, layout: str) -> None:
        data = self.reader.take(self.reader.unpack(layout))
        if len(data) * 8 > MAX_INTEGER_BITS:
            raise self.refusal(f"an integer of {len(data)} bytes")
        self.push(int.from_bytes(data, "little", signed=True))

    def text(self, layout: str) -> None:
        self.push(_text(self.reader.take(self.reader.unpack(layout))))

    def data(self, layout: str) -> None:
        self.push(self.reader.take(self.reader.unpack(layout)))

    def append(self, items: list) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise self.refusal("a dict item without its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def add_items(self, items: list) -> None:
        self.top(set).update([self.key(item) for item in items])

    def key(self, value: object) -> str | int:
        # Nothing nested, whose hashing is recursive, and no integer large enough to force hash collisions.
        if isinstance(value, str) or (isinstance(value, int) and -(2**31) <= value < 2**31):
            return value
        raise self.refusal(f"a {type(value).__name__} as a key")

    def get(self, layout: str) -> None:
        index = self.reader.unpack(layout)
        if index not in self.memo:
            raise self.refusal(f"a reference to value {index}, which does not exist,")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top(object)

    def find_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.names:
            shown = full if full.isascii() and full.isprintable() and len(full) < 200 else ascii(full[:200])
            raise UnsafePickleError(
                f"the pickle asks for {shown}, which a pickled EDM network never needs; loading it the ordinary way "
                "could run code, so it was refused"
            )
        self.push(self.names[full])

    def stack_global(self) -> None:
        name = self.pop(str)
        self.find_global(self.pop(str), name)

    def reduce(self) -> None:
        arguments = self.pop(tuple)
        self.push(self.pop(Constructor).make(arguments))

    def build(self) -> None:
        state = self.pop()
        self.top(StandIn).build(state)

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise self.refusal("opcode BINPERSID")
        self.push(self.persistent(self.pop()))


def _text(data: memoryview | bytes) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise UnsafePickleError("the pickle has a string that is not UTF-8; the file is corrupt") from None


def _check_protocol(machine: Machine) -> None:
    version = machine.reader.unpack("<B")
    if version > pickle.HIGHEST_PROTOCOL:
        raise machine.refusal(f"protocol {version}")


_OPERATIONS: dict[int, Callable[[Machine], None]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: _check_protocol,
        pickle.FRAME: lambda m: m.reader.unpack("<Q"),  # only a hint for read-ahead
        pickle.MARK: Machine.mark,
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: m.push(m.reader.unpack("<i")),
        pickle.BININT1: lambda m: m.push(m.reader.unpack("<B")),
        pickle.BININT2: lambda m: m.push(m.reader.unpack("<H")),
        pickle.LONG1: lambda m: m.long("<B"),
        pickle.LONG4: lambda m: m.long("<i"),
        pickle.BINFLOAT: lambda m: m.push(m.reader.unpack(">d")),
        pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
        pickle.BINUNICODE: lambda m: m.text("<I"),
        pickle.BINUNICODE8: lambda m: m.text("<Q"),
        pickle.SHORT_BINBYTES: lambda m: m.data("<B"),
        pickle.BINBYTES: lambda m: m.data("<I"),
        pickle.BINBYTES8: lambda m: m.data("<Q"),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.APPEND: lambda m: m.append([m.pop()]),
        pickle.APPENDS: lambda m: m.append(m.pop_mark()),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
        pickle.EMPTY_SET: lambda m: m.push(set()),
        pickle.ADDITEMS: lambda m: m.add_items(m.pop_mark()),
        pickle.BINGET: lambda m: m.get("<B"),
        pickle.LONG_BINGET: lambda m: m.get("<I"),
        pickle.BINPUT: lambda m: m.put(m.reader.unpack("<B")),
        pickle.LONG_BINPUT: lambda m: m.put(m.reader.unpack("<I")),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.GLOBAL: lambda m: m.find_global(m.reader.line(), m.reader.line()),
        pickle.STACK_GLOBAL: Machine.stack_global,
        pickle.REDUCE: Machine.reduce,
        pickle.NEWOBJ: Machine.reduce,
        pickle.BUILD: Machine.build,
        pickle.BINPERSID: Machine.persistent_id,
    }.items()
}
