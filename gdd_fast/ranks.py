"""The processes that train, sample or measure together, as torchrun starts them, and their exchanges."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gdd_fast.device import pick_device
from gdd_fast.errors import ConfigError, LostProcessError

T = TypeVar("T")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes that work together. A single process is a world of size 1, in which every exchange is a no-op."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers. The hosts exchange them: called in every iteration, this must not wait for
        pending work of the GPUs."""
        if self.size == 1:
            return number
        votes = torch.tensor([number])
        with exchanging():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return int(votes.item())

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """This tensor of every rank, in rank order, on the CPU; shapes and dtypes must agree."""
        if self.size == 1:
            return [tensor.cpu()]
        own = tensor.to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with exchanging():
            dist.all_gather(parts, own)
        return [part.cpu() for part in parts]

    def share(self, items: Sequence[T], batch: int) -> list[T]:
        """This rank's part of `items`: with these in batches of `batch`, every size-th batch from the rank-th on."""
        starts = range(self.rank * batch, len(items), self.size * batch)
        return [item for start in starts for item in items[start : start + batch]]

    def from_main(self, value: T) -> T:
        """The main rank's `value`, made of plain types, on every rank."""
        held = [value]
        if self.size > 1:
            with exchanging():
                dist.broadcast_object_list(held, 0, device=torch.device("cpu"))
        return held[0]

    def in_order(self, items: Iterable[T], *, everywhere: bool = False) -> Iterator[T]:
        """On the main rank, or with `everywhere` on every rank: the items of all ranks, the first of each, then the
        second of each, and so on.

        Items are tensors and plain types, or tuples and lists of them; exchanged tensors arrive on the CPU. Ranks that
        get nothing must exhaust the iterator all the same, to send their items.
        """
        if self.size == 1:
            yield from items
            return
        own = iter(items)
        while True:
            mine = list(islice(own, 1))  # empty if another rank has one more
            if not self.largest(len(mine)):
                return
            mine = tree_map_only(Tensor, Tensor.cpu, mine)
            found: list[list[T]] = [[] for _ in range(self.size)]
            with exchanging():
                if everywhere:
                    dist.all_gather_object(found, mine)
                else:
                    dist.gather_object(mine, found if self.is_main else None)
            yield from chain.from_iterable(found)

    def barrier(self) -> None:
        if self.size > 1:
            with exchanging():
                dist.barrier()


ALONE = World(0, 1, torch.device("cpu"))
"""For what a process computes on its own."""


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Raises `LostProcessError` if another process of the world has gone."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: RuntimeError) -> LostProcessError:
    reason = str(error).splitlines()[0]
    return LostProcessError(
        f"another process of this run has ended; its own message, or torchrun's, says which and why ({reason})"
    )


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    """Whether gloo or NCCL reports, from an exchange of FSDP's and not ours, that the other side has gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it. Raises `ConfigError` as `join` does."""
    launched = _launched()
    return 1 if launched is None else launched[1]


def is_main() -> bool:
    """Whether this process is the one of its run that writes and prints. Raises `ConfigError` as `join` does."""
    launched = _launched()
    return launched is None or launched[0] == 0


def _launched() -> tuple[int, int, int] | None:
    """Rank, size and local rank as torchrun sets them; None in a process that it did not start."""
    if not any(name in os.environ for name in _TORCHRUN):
        return None
    _check_environment(_TORCHRUN)
    try:
        rank, size, local = (int(os.environ[name]) for name in _TORCHRUN)
    except ValueError:
        rank, size, local = -1, 0, -1
    if not (0 <= rank < size and local >= 0):
        said = ", ".join(f"{name}={os.environ[name]!r:.20}" for name in _TORCHRUN)
        raise ConfigError(f"{said} in the environment are not what torchrun would set; start with torchrun")
    return rank, size, local


def _check_environment(names: Iterable[str]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not in the environment, but torchrun sets it; start with torchrun")


@contextlib.contextmanager
def join(option: str) -> Iterator[World]:
    """Enter the world in which torchrun started this process, or a world of one; leave it at the end.

    Raises `ConfigError` for a missing device or an environment that is only partly torchrun's, and `LostProcessError`
    if the block ends because another process of the world did.
    """
    device = pick_device(option)
    launched = _launched()
    if launched is None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        yield World(0, 1, device)
        return
    rank, size, local = launched
    if device.type == "cuda":
        device = pick_device(f"cuda:{local}")  # an error here: more processes than GPUs
        torch.cuda.set_device(device)
    # The store outlives a group: a second group in the same processes must not find the first one's addresses in it.
    _check_environment(_ADDRESS)
    try:
        store, _, _ = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:  # no port, no such host, or a port in use by another program
        where, why = ":".join(os.environ[name] for name in _ADDRESS), str(error).partition("\n")[0]
        raise ConfigError(f"the processes of this run cannot meet at {where} ({why}); start with torchrun") from error
    number = (store.add("gdd_fast.joined", 1) - 1) // size
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"gdd_fast.{number}", store), rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    except RuntimeError as error:
        if not _is_of_a_lost_process(error):
            raise
        raise _lost(error) from error
    # Not after an error: the other ranks may be gone already, and torchrun ends those that are not.
    dist.destroy_process_group()
