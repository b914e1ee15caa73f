"""Whether a generator repeats its training images: samples beside their nearest ones, and the distances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdd_fast.metrics.neighbours import Nearest, nearest, share_nearer
from gdd_fast.sampling.grid import save_panel

PAIRS, COLUMNS = 24, 12
"""Pairs in each part of a sheet, and per line."""
GetImages = Callable[[Sequence[int]], Tensor]
"""Indices -> uint8 images (N, C, H, W)."""


@dataclass(frozen=True)
class Memorisation:
    """Nearest training images of N samples, and of M held-out images if there are any."""

    samples: Nearest
    held_out: Nearest | None

    @classmethod
    def of(cls, samples: Tensor, training: Tensor, held_out: Tensor | None = None) -> "Memorisation":
        """From features float32 (N, F), (K, F) and (M, F) on one device."""
        return cls(nearest(samples, training), None if held_out is None else nearest(held_out, training))

    def values(self) -> dict[str, float]:
        """`nn_distance`, the median; with held-out images `nn_distance_held_out` and `nn_share_nearer`.

        The last is the probability that a sample is nearer to its nearest training image than a held-out image is to
        its own: 0.5 for a generator that makes new images, towards 1 for one that copies.
        """
        found = {"nn_distance": float(self.samples.distance.median())}
        if self.held_out is not None:
            found["nn_distance_held_out"] = float(self.held_out.distance.median())
            found["nn_share_nearer"] = share_nearer(self.samples.distance, self.held_out.distance)
        return found

    def save_sheet(self, path: Path, samples: GetImages, training: GetImages) -> None:
        """Write a PNG of the samples nearest to a training image, and of the first samples, each above its nearest."""
        there = len(self.samples.distance)
        columns = min(COLUMNS, there)
        count = min(PAIRS, there - there % columns)
        by_distance = self.samples.distance.argsort()[:count].tolist()
        rows = []
        for title, chosen in (
            ("{} samples nearest to a training image", by_distance),
            ("first {} samples", list(range(count))),
        ):
            pairs = samples(chosen), training(self.samples.index.cpu()[chosen].tolist())
            lines = [line for both in zip(*(x.split(columns) for x in pairs), strict=True) for line in both]
            rows.append((f"The {title.format(count)}, each above its nearest one", torch.cat(lines)))
        save_panel(rows, path, cols=columns)
