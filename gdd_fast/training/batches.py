"""How a batch is shared out: over the ranks, and over passes through the networks whose gradients add up."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from gdd_fast.errors import ConfigError


def split_batch(batch: int, batch_gpu: int | Literal["auto"] | None, world_size: int) -> tuple[int, int]:
    """Images per rank, and images at once, for a batch over all ranks; raises `ConfigError` if they do not divide.

    "auto" is, as None, all at once: on a GPU a number takes its place before a run begins (distill.memory_forecast).
    """
    if batch % world_size:
        raise ConfigError(f"--batch {batch} cannot be shared equally by {world_size} processes")
    local = batch // world_size
    micro = local if batch_gpu in (None, "auto") else min(int(batch_gpu), local)
    if local % micro:
        raise ConfigError(f"--batch-gpu {micro} does not divide the {local} images of each process")
    return local, micro


def chunks(tensor: Tensor | None, size: int, total: int) -> Sequence[Tensor | None]:
    """The `total` rows of `tensor`, `size` at a time; as many times None if there is no tensor (such as labels)."""
    return [None] * -(-total // size) if tensor is None else tensor.split(size)
