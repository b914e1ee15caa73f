"""Batches of images that several processes make, in the order of their seeds."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gdd_fast.ranks import World
from gdd_fast.sampling.generate import Batch

_CLASS_BYTES = 8


def on_all_ranks(world: World, batches: Iterator[Batch], seeds: Sequence[int]) -> Iterator[Batch]:
    """On the main rank the batches of all of `seeds`, in host memory; `batches` are those of `world.share(seeds)`.

    Other ranks get nothing, and have to go through the iterator all the same. One process gets its own batches.
    """
    if world.size == 1:
        yield from batches
        return
    form: list[tuple[torch.Size, bool]] = []
    start = 0
    for packed in world.in_order(_packed(batches, form)):
        shape, labelled = form[0]
        pixels = packed[:, : shape.numel()].reshape(-1, *shape)
        classes = packed[:, shape.numel() :].contiguous().view(torch.int64).flatten() if labelled else None
        yield Batch(list(seeds[start : start + len(packed)]), pixels, classes, torch.tensor(True))
        start += len(packed)


def _packed(batches: Iterator[Batch], form: list[tuple[torch.Size, bool]]) -> Iterator[Tensor]:
    """Each image with its class behind it, as bytes (N, bytes); what they are made of goes to `form`."""
    for batch in batches:
        parts = [batch.images.cpu().flatten(1)]
        if batch.classes is not None:
            parts.append(batch.classes.cpu().contiguous().view(torch.uint8).reshape(-1, _CLASS_BYTES))
        form.append((batch.images.shape[1:], batch.classes is not None))
        yield torch.cat(parts, 1)
