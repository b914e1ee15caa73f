"""What runs on the device in a step: an entry for each kernel, with its FLOP and bytes, counted without a device.

The step runs on fake tensors. Every operator below autograd is one kernel that reads its inputs and writes its results
once, but for these: a convolution's gradients are a product each; its bias, and the bias' gradient, are a pass over the
map; what normalises reads its input twice; views and empty memory are nothing. `on_a_gpu` has our operators run as they
would there, each as one operator.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gdd_fast import backend

_NOTHING = ("empty", "detach", "_unsafe_view", "lift")
_NORMS = ("native_group_norm", "native_batch_norm", "native_layer_norm", "group_norm_silu", "_batch_norm")


@dataclass(frozen=True)
class Kernel:
    """One launch. A product has `rows` x `columns` results, other kernels none.

    `reads` and `writes` are bytes by number of the memory, in the order in which a step first touches it.
    """

    operator: str
    reads: dict[int, int]
    writes: dict[int, int]
    dtype: torch.dtype
    flop: float = 0.0
    rows: int = 0
    columns: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Count:
    """The kernels of a step in their order, and how many operators the host dispatched for them, views among them."""

    kernels: list[Kernel] = field(default_factory=list)
    dispatched: int = 0

    @property
    def flop(self) -> float:
        return sum(kernel.flop for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)


def count_kernels(step: Callable[[], object]) -> Count:
    """Of one call; within a FakeTensorMode, or on meta tensors."""
    with _Counting() as counting:
        step()
    return counting.count


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Operators with backend "auto" choose on fake tensors of a CPU what they would on a GPU."""
    preference = {"cpu": backend.PREFERENCE["cuda"]}
    with (
        mock.patch.object(backend, "PREFERENCE", preference),
        mock.patch.object(backend, "obstacle", lambda operator, b, _: None if b in {"torch", *operator.fused} else b),
    ):
        yield


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """As a compiler might at its best: what runs between two products is one kernel, which reads what others made and
    writes what others read later."""
    last_read = {memory: i for i, kernel in enumerate(kernels) for memory in kernel.reads}
    result: list[Kernel] = []
    run: list[int] = []
    for index, kernel in enumerate([*kernels, None]):
        if kernel is not None and not kernel.flop:
            run.append(index)
            continue
        if run:
            made = {m: b for i in run for m, b in kernels[i].writes.items()}
            reads = {m: b for i in run for m, b in kernels[i].reads.items() if m not in made}
            writes = {m: b for m, b in made.items() if last_read.get(m, len(kernels)) > run[-1]}
            result.append(replace(kernels[run[0]], operator="fused", reads=reads, writes=writes))
            run = []
        if kernel is not None:
            result.append(kernel)
    return result


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # or memory that is given up would come again as another's

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "prim":
            return result
        self.count.dispatched += 1
        name = function._schema.name.split("::")[1]
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not views and not name.startswith(_NOTHING):
            self.count.kernels += self._kernels(function, name, args, kwargs, result)
        return result

    def _kernels(self, function, name, args, kwargs, result) -> list[Kernel]:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        reads, writes = (dict(self._memory(t) for t in tensors) for tensors in (inputs, results))
        dtype = (results or inputs)[0].dtype if results or inputs else torch.float32
        whole = Kernel(name, reads, writes, dtype)
        if name == "convolution":
            x, weight, bias = args[:3]
            product = Kernel(name, dict(map(self._memory, (x, weight))), writes, dtype, *_product(weight, result))
            return [product, *([Kernel("bias", writes, writes, dtype)] if bias is not None else [])]
        if name == "convolution_backward":
            return self._gradients(args, result, dtype)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            flop, out = formula(*args, **kwargs, out_val=result), results[0]
            return [replace(whole, flop=float(flop), rows=out.numel() // out.shape[-1], columns=out.shape[-1])]
        if name.startswith(_NORMS):
            first = dict([self._memory(inputs[0])])
            return [Kernel(f"{name} statistics", first, {}, dtype), whole]
        return [whole]

    def _gradients(self, args, result, dtype) -> list[Kernel]:
        """Of the input, the weight and the bias of a convolution, as far as they are asked for."""
        dy, x, weight = args[:3]
        dx, dweight, dbias = result
        found = []
        # either product has as many multiplications as the convolution
        flop = _product(weight, dy)[0]
        if dx is not None:
            reads, writes = map(dict, (map(self._memory, (dy, weight)), [self._memory(dx)]))
            found.append(Kernel("input gradient", reads, writes, dtype, flop, *_product(weight, dx)[1:]))
        if dweight is not None:
            reads, writes = map(dict, (map(self._memory, (dy, x)), [self._memory(dweight)]))
            # its sum over positions is split over the device
            found.append(Kernel("weight gradient", reads, writes, dtype, flop))
        if dbias is not None:
            found.append(Kernel("bias gradient", dict([self._memory(dy)]), dict([self._memory(dbias)]), dtype))
        return found

    def _memory(self, t: Tensor) -> tuple[int, int]:
        storage = t.untyped_storage()
        self._alive.append(storage)
        number = self._numbers.setdefault(storage._cdata, len(self._numbers))
        return number, min(t.numel() * t.itemsize, storage.nbytes())


def _product(weight: Tensor, out: Tensor) -> tuple[float, int, int]:
    """FLOP, rows and columns of a convolution with results `out`."""
    return 2.0 * out.numel() * weight.shape[1:].numel(), out.shape[0] * out.shape[2:].numel(), out.shape[1]
