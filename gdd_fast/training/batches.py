"""How a batch is divided: over the ranks, and over passes through the networks whose gradients accumulate."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from gdd_fast.errors import ConfigError


def split_batch(batch: int, batch_gpu: int | Literal["auto"] | None, world_size: int) -> tuple[int, int]:
    """Images per rank and images per pass for a batch over all ranks. Raises `ConfigError` if they do not divide.

    "auto", like None, is all in one pass: on a GPU a run replaces it by a number first (distill.memory_forecast).
    """
    if batch % world_size:
        raise ConfigError(f"--batch {batch} cannot be divided equally among {world_size} processes")
    local = batch // world_size
    micro = local if batch_gpu in (None, "auto") else min(int(batch_gpu), local)
    if local % micro:
        raise ConfigError(f"--batch-gpu {micro} does not divide the {local} images of each process")
    return local, micro


def chunks(tensor: Tensor | None, size: int, total: int) -> Sequence[Tensor | None]:
    """The `total` rows of `tensor`, `size` at a time; as many Nones if there is no tensor (of labels, say)."""
    return [None] * -(-total // size) if tensor is None else tensor.split(size)
