"""`python -m benchmarks.counts.peak_memory`: memory of one forward pass, the plain network against the engine.

Counted without a GPU, at any batch: tensors are fake, those that torch.compile traces with, and every storage that an
operator returns is counted from then until the last tensor that uses it is gone. Weights are counted apart. What an
operator takes and gives back inside, such as a convolution's workspace, is not seen. With `--measure` on a machine with
a GPU, the same passes run and PyTorch's allocator is asked.
"""

import argparse
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases.layer_calls import NETWORKS
from benchmarks.counts.dispatched import build, fake_engine, inputs
from benchmarks.counts.plain import plain_pytorch
from benchmarks.harness.timing import peak_bytes
from gdd_fast.engine.fold import SIGMA
from gdd_fast.engine.one_step import OneStepGenerator


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


def weights(*modules: nn.Module | None) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def peak(function: Callable[..., Tensor], *arguments: Tensor | None) -> int:
    """Bytes that `function(*arguments)` takes at most beside its arguments."""
    with torch.no_grad(), PeakMemory() as memory:
        result = function(*arguments)
        del result
    return memory.most


def plain(name: str, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights, and at most beside them: plain PyTorch."""
    with FakeTensorMode():
        net = build(name, NETWORKS[name][1]["model_channels"], dtype)
        latents, classes = inputs(net, "cpu", batch)
        labels = None if classes is None else F.one_hot(classes, net.label_dim).float()
        with plain_pytorch(net):
            return weights(net), peak(lambda z: net(z * SIGMA, torch.tensor(SIGMA), labels), latents)


def engine(name: str, batch: int) -> tuple[int, int]:
    """The same of the engine in bfloat16."""
    with fake_engine(name, NETWORKS[name][1]["model_channels"]) as (net, unet, conditioning):
        latents, classes = inputs(net, "cuda", batch)
        took = peak(lambda z, c: unet(z, None if conditioning is None else conditioning(c)), latents, classes)
        return weights(unet, conditioning), took


@torch.no_grad()
def measure(name: str, batch: int) -> dict[str, tuple[int, int]]:
    """Weights and peak on the GPU, by the allocator; the engine runs eagerly, as a graph keeps its memory."""
    net = build(name, NETWORKS[name][1]["model_channels"]).cuda()
    generator = OneStepGenerator.from_network(net, dtype="bfloat16", engine="eager")
    z, classes = inputs(net, "cuda", batch)
    labels = None if classes is None else F.one_hot(classes, net.label_dim).float()

    def measured(function: Callable[[], Tensor]) -> int:
        function()  # libraries take memory for good when they are first called
        return peak_bytes(function, z.device)

    own = weights(generator.folded, generator.conditioning)
    found = {"engine, torch.bfloat16": (own, measured(lambda: generator.run(z, classes)))}
    with plain_pytorch(net):
        for dtype in (torch.float32, torch.bfloat16):
            net.dtype = dtype
            found[f"plain, {dtype}"] = weights(net), measured(lambda: net(z * SIGMA, SIGMA, labels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.peak_memory", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--networks", nargs="+", default=["ncsnpp-32", "adm-64"], choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--measure", action="store_true", help="run on the GPU instead of counting")
    options = parser.parse_args()
    # of fake weights: the networks' cache of cast weights asks where in memory they are
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    print(f"{f'batch {options.batch}, MB':<36}{'weights':>10}{'beside':>10}")
    for name in options.networks:
        if options.measure:
            rows = measure(name, options.batch)
        else:
            rows = {
                f"plain, {dtype}": plain(name, options.batch, dtype) for dtype in (torch.float32, torch.bfloat16)
            } | {"engine, torch.bfloat16": engine(name, options.batch)}
        for label, (own, took) in rows.items():
            print(f"{name + ', ' + label:<36}{own / 1e6:>10.0f}{took / 1e6:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
