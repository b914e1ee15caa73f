"""Rebuilds the tensors and NumPy scalars of a pickled network from their bytes, without PyTorch's unpickler.

A pickled tensor is a view (offset, size, stride) of a storage, and a pickled storage is itself a file in torch.save's
format before 1.6: five pickles (magic number, protocol, machine, storage id, keys), then the number of elements and the
elements. Reading exactly this with `Machine` leaves no nested load to attack.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gdd_fast.errors import UnsafePickleError
from gdd_fast.models.files.pickle_machine import Machine, Reader, StandIn

TORCH_SAVE_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of every torch.save file before the zip format
TORCH_SAVE_PROTOCOL = 1001
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # product of nonzero sizes, so that not even an empty tensor's overflow in PyTorch
STORAGE_TYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
NUMPY_SCALARS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


@dataclass(frozen=True, slots=True)
class Storage:
    """`data`: the elements' bytes, little-endian, a view of the file."""

    data: memoryview
    dtype: torch.dtype

    @classmethod
    def from_bytes(cls, data: memoryview) -> "Storage":
        """The storage that `data` holds in the format described above."""
        reader = Reader(data)
        if data[:2] == b"PK" or Machine(reader, {}).load() != TORCH_SAVE_MAGIC:
            raise UnsafePickleError("a tensor's storage is not in PyTorch's format for pickled storages")
        protocol = Machine(reader, {}).load()
        machine = Machine(reader, {}).load()
        if protocol != TORCH_SAVE_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UnsafePickleError("a tensor's storage was written in another format, or on a big-endian machine")
        # The pickle of a bare storage is its persistent id; a location such as 'cuda:0' does not matter.
        match Machine(reader, STORAGE_TYPES, persistent=lambda identity: ("id", identity)).load():
            case ("id", ("storage", torch.dtype() as dtype, str(), str(), int(count), None)):
                pass
            case _:
                raise UnsafePickleError("torch.storage._load_from_bytes holds something that is not one storage")
        Machine(reader, {}).load()  # the list of keys, here only one
        if reader.unpack("<q") != count or reader.remaining != count * dtype.itemsize:
            raise UnsafePickleError(
                f"a tensor's storage claims {count} elements of {dtype} but does not have them; the file is corrupt"
            )
        return cls(reader.take(reader.remaining), dtype)


class Storages:
    """For `torch.storage._load_from_bytes(bytes)` in one file: the same bytes are read only once.

    Referring to them again costs a file only a few bytes, whatever their length.
    """

    def __init__(self) -> None:
        self._read: dict[int, tuple[memoryview, Storage]] = {}  # by id; the bytes are kept so that no id is reused

    def __call__(self, arguments: tuple) -> Storage:
        match arguments:
            case (memoryview() as data,):
                if id(data) not in self._read:
                    self._read[id(data)] = (data, Storage.from_bytes(data))
                return self._read[id(data)][1]
        raise UnsafePickleError("torch.storage._load_from_bytes is called with something that is not bytes")


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage, checked to be within it; sizes and strides are in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def from_arguments(cls, arguments: tuple) -> "PickledTensor":
        """For `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
        match arguments:
            case (Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), *_) if len(arguments) <= 7:
                pass
            case _:
                raise UnsafePickleError("torch._utils._rebuild_tensor_v2 is called with wrong arguments")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise UnsafePickleError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
            raise UnsafePickleError("a tensor's offset, sizes and strides must be integers >= 0")
        if math.prod(length for length in size if length) > MAX_ELEMENTS:
            raise UnsafePickleError(f"a tensor of size {size} is larger than any network's")
        tensor = cls(storage, offset, size, stride)
        available = len(storage.data) // storage.dtype.itemsize
        # The second test refuses expanded views, which would let a small file ask for a huge tensor.
        if offset + tensor.extent > available or tensor.count > available:
            raise UnsafePickleError(
                f"a tensor of size {size}, stride {stride} and offset {offset} does not fit its storage of "
                f"{available} elements"
            )
        return tensor

    @classmethod
    def from_parameter(cls, arguments: tuple) -> "PickledTensor":
        """For `torch._utils._rebuild_parameter(data, requires_grad, hooks)`."""
        match arguments:
            case (PickledTensor() as tensor, bool(), dict()):
                return tensor
        raise UnsafePickleError("torch._utils._rebuild_parameter is called with wrong arguments")

    @property
    def count(self) -> int:
        return math.prod(self.size)

    @property
    def bytes(self) -> int:
        return self.count * self.storage.dtype.itemsize

    @property
    def extent(self) -> int:
        """The number of storage elements from the first to the last one used, inclusive."""
        if self.count == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    def materialise(self) -> torch.Tensor:
        """A contiguous CPU tensor with its own memory."""
        dtype = self.storage.dtype
        if self.count == 0:
            return torch.empty(self.size, dtype=dtype)
        width = dtype.itemsize
        span = self.storage.data[self.offset * width : (self.offset + self.extent) * width]
        # Copied as bytes, as the position in the file need not be aligned for the dtype, and only those used: the
        # extent may be the whole storage, and one storage may be shared by all parameters. A dimension of size 1 gets
        # stride 0, as the stride in the file may be too large to be counted in bytes.
        strides = [stride * width if length > 1 else 0 for length, stride in zip(self.size, self.stride, strict=True)]
        view = torch.frombuffer(span, dtype=torch.uint8).as_strided((*self.size, width), (*strides, 1))
        elements = view.clone(memory_format=torch.contiguous_format)
        # A torch.bool whose byte is not 0 or 1 is undefined.
        return (elements.ne(0) if dtype == torch.bool else elements.view(dtype)).squeeze(-1)


class NumpyType(StandIn):
    """For `numpy.dtype(code, align, copy)` and its state (version, byte order, ...)."""

    __slots__ = ("code", "order")

    def __init__(self, arguments: tuple) -> None:
        match arguments:
            case (str(code), bool(), bool()) if code in NUMPY_SCALARS:
                self.code = code
                self.order = "<"
            case _:
                raise UnsafePickleError("the pickle has a numpy.dtype that is not a plain number type")

    def build(self, state: object) -> None:
        match state:
            case (int(), ("<" | "|" | ">") as order, None, None, None, *_):
                self.order = order
            case _:
                raise UnsafePickleError("the pickle has a numpy.dtype that is not a plain number type")


def numpy_scalar(arguments: tuple) -> bool | int | float:
    """For `numpy.core.multiarray.scalar(dtype, bytes)`: the Python number."""
    match arguments:
        case (NumpyType() as kind, memoryview() as data):
            dtype = np.dtype(kind.order + kind.code)
            if len(data) == dtype.itemsize:
                return np.frombuffer(data, dtype)[0].item()
    raise UnsafePickleError("the pickle has a NumPy scalar that is not a plain number")
