"""Memory of a function, counted on fake tensors: no memory is taken, whatever their size."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators returned within it and that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in before | self.alive:
                    self.now += storage.nbytes()
                    self.alive.add(storage._cdata)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self.alive.discard(key)
        self.now -= nbytes
