"""What runs on the device in a step: an entry for each kernel, with its FLOP and bytes, counted without a device.

The step runs on fake tensors. Every operator below autograd is one kernel that reads its inputs and writes its results
once, but for these: a convolution's gradients are a product each; its bias, and the bias' gradient, are a pass over the
map; what normalises reads its input twice; views and empty memory are nothing. `on_a_gpu` has our operators run as they
would there, each as one operator.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gdd_fast import backend
from gdd_fast.layers import silent

_NOTHING = ("empty", "detach", "_unsafe_view", "lift")
_NORMS = ("native_group_norm", "native_batch_norm", "native_layer_norm", "group_norm_silu", "_batch_norm")


IMAGES = 37
"""How many a step is counted with: no channels, maps or kernels of the networks are a multiple of it, so a tensor with
a side that is grows with the batch, and all others do not."""


@dataclass(frozen=True)
class Kernel:
    """One launch. A product has `rows` x `columns` results, other kernels none.

    `reads` and `writes` are bytes by number of the memory, in the order in which a step first touches it; `growing` are
    those memories that grow with the batch.
    """

    operator: str
    reads: dict[int, float]
    writes: dict[int, float]
    dtype: torch.dtype
    growing: frozenset[int]
    flop: float = 0.0
    rows: float = 0
    columns: int = 0

    @property
    def bytes(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())

    def at(self, images: int) -> "Kernel":
        """The same kernel with another number of images than `IMAGES`."""
        factor = images / IMAGES
        reads, writes = (
            {memory: size * factor if memory in self.growing else size for memory, size in sizes.items()}
            for sizes in (self.reads, self.writes)
        )
        grows = factor if self.growing else 1.0
        return replace(self, reads=reads, writes=writes, flop=self.flop * grows, rows=self.rows * grows)


@dataclass
class Count:
    """The kernels of a step in their order, and how many operators the host dispatched for them, views among them."""

    kernels: list[Kernel] = field(default_factory=list)
    dispatched: int = 0

    @property
    def flop(self) -> float:
        return sum(kernel.flop for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    def at(self, images: int) -> "Count":
        """The same step with another number of images than `IMAGES`."""
        return Count([kernel.at(images) for kernel in self.kernels], self.dispatched)


def count_kernels(step: Callable[[], object]) -> Count:
    """The kernels of one call, within a FakeTensorMode or on meta tensors; for `Count.at`, a call with `IMAGES` images.

    FLOP are two for a multiply-add, of convolutions, matrix products and attention, backward passes included.
    """
    with _Counting() as counting:
        step()
    return counting.count


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Operators with backend "auto" choose on fake tensors of a CPU what they would on a GPU. Fake parameters are as
    plain as any, so their convolutions may leave the bias to what follows."""
    preference = {"cpu": backend.PREFERENCE["cuda"]}
    with (
        mock.patch.object(silent, "_PLAIN", (*silent._PLAIN, FakeTensor)),
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
            growing = frozenset().union(*(kernels[i].growing for i in run))
            result.append(replace(kernels[run[0]], operator="fused", reads=reads, writes=writes, growing=growing))
            run = []
        if kernel is not None:
            result.append(kernel)
    return result


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._numbers: dict[int, int] = {}
        self._growing: set[int] = set()
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
            for kernel in self._kernels(function, name, args, kwargs, result):
                growing = self._growing & (kernel.reads.keys() | kernel.writes.keys())
                self.count.kernels.append(replace(kernel, growing=frozenset(growing)))
        return result

    def _kernels(self, function, name, args, kwargs, result) -> list[Kernel]:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        changed = [a for a, of in zip(args, function._schema.arguments, strict=False) if of.is_write]
        results = [t for t in tree_leaves((result, changed)) if isinstance(t, Tensor)]
        reads, writes = (dict(self._memory(t) for t in tensors) for tensors in (inputs, results))
        dtype = (results or inputs)[0].dtype if results or inputs else torch.float32
        one = partial(Kernel, dtype=dtype, growing=frozenset())
        whole = one(name, reads, writes)
        if name == "convolution":
            x, weight, bias, *_, transposed, _, _ = args
            flop = _flop(x, weight, result, transposed)
            product = one(name, dict(map(self._memory, (x, weight))), writes, flop=flop, **_sides(result))
            return [product, *([one("bias", writes, writes)] if bias is not None else [])]
        if name == "convolution_backward":
            return self._gradients(args, result, one)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            flop, out = formula(*args, **kwargs, out_val=result), results[0]
            return [replace(whole, flop=float(flop), rows=out.numel() // out.shape[-1], columns=out.shape[-1])]
        if name.startswith(_NORMS):
            first = dict([self._memory(inputs[0])])
            return [one(f"{name} statistics", first, {}), whole]
        return [whole]

    def _gradients(self, args, result, one: Callable[..., Kernel]) -> list[Kernel]:
        """Kernels for the gradients of a convolution's input, weight and bias, as far as they are asked for."""
        dy, x, weight, *_, transposed, _, _, _ = args
        dx, dweight, dbias = result
        found = []
        flop = _flop(x, weight, dy, transposed)  # either product multiplies as often as the convolution
        if dx is not None:
            sizes = dict(map(self._memory, (dy, weight))), dict([self._memory(dx)])
            found.append(one("input gradient", *sizes, flop=flop, **_sides(dx)))
        if dweight is not None:  # its sum over positions is split over the device
            found.append(
                one("weight gradient", dict(map(self._memory, (dy, x))), dict([self._memory(dweight)]), flop=flop)
            )
        if dbias is not None:
            found.append(one("bias gradient", dict([self._memory(dy)]), dict([self._memory(dbias)])))
        return found

    def _memory(self, t: Tensor) -> tuple[int, float]:
        storage = t.untyped_storage()
        self._alive.append(storage)
        number = self._numbers.setdefault(storage._cdata, len(self._numbers))
        if any(side and side % IMAGES == 0 for side in t.shape):
            self._growing.add(number)
        return number, min(t.numel() * t.itemsize, storage.nbytes())


def _flop(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> float:
    """FLOP of a convolution: two for each multiplication by a weight."""
    return 2.0 * (x if transposed else out).numel() * weight.shape[1:].numel()


def _sides(out: Tensor) -> dict[str, int]:
    return {"rows": out.shape[0] * out.shape[2:].numel(), "columns": out.shape[1]}
