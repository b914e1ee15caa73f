"""Distances to nearest neighbours in feature space, in tiles: the table of all pairs is never held in memory.

Precision and recall: Kynkaanniemi et al., arXiv 1904.06991. Density and coverage: Naeem et al., arXiv 2002.09797.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gdd_fast.errors import DataError

TILE = 4096
"""Rows and columns per tile: 64 MiB of float32 distances."""
PRECISION_K, COVERAGE_K = 3, 5


class Nearest(NamedTuple):
    """For each of N rows, the nearest of M others: its distance, float32 (N,), and its index, int64 (N,)."""

    distance: Tensor
    index: Tensor


def precision_recall(generated: Tensor, real: Tensor, k: int = PRECISION_K) -> tuple[float, float]:
    """The fractions of generated images within real neighbourhoods, and of real images within generated ones.

    A neighbourhood is the ball around an image that reaches its `k`-th nearest neighbour in the same set. Features are
    (N, F) and (M, F), float32 on one device. Raises `DataError` for sets of at most `k` images.
    """
    real_radii, generated_radii = squared_radii(real, k), squared_radii(generated, k)
    covered = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distance in _tiles(generated, real):
        covered[rows] |= (distance <= real_radii[columns]).any(1)
        recalled[columns] |= (distance <= generated_radii[rows, None]).any(0)
    return float(covered.double().mean()), float(recalled.double().mean())


def density_coverage(generated: Tensor, real: Tensor, k: int = COVERAGE_K) -> tuple[float, float]:
    """Mean number of real neighbourhoods around a generated image, over `k`; the fraction of them that hold one."""
    radii = squared_radii(real, k)
    inside = torch.zeros((), dtype=torch.int64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, columns, distance in _tiles(generated, real):
        within = distance <= radii[columns]
        inside += within.sum()
        covered[columns] |= within.any(0)
    return float(inside) / (k * len(generated)), float(covered.double().mean())


def squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row of (N, F) to its `k`-th nearest other row, float32 (N,)."""
    if len(x) <= k:
        raise DataError(f"{k} nearest neighbours need more than {k} images, not {len(x)}")
    nearest = x.new_full((len(x), k), torch.inf)
    for rows, columns, distance in _tiles(x, x):
        if rows == columns:
            distance.fill_diagonal_(torch.inf)  # an image is not its own neighbour
        best = torch.cat([nearest[rows], distance.topk(min(k, distance.shape[1]), largest=False).values], 1)
        nearest[rows] = best.topk(k, largest=False).values
    return nearest[:, -1]


def nearest(x: Tensor, others: Tensor) -> Nearest:
    """The nearest of `others` (M, F) to each row of `x` (N, F)."""
    distance = x.new_full((len(x),), torch.inf)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for rows, columns, tile in _tiles(x, others):
        values, places = tile.min(1)
        closer = values < distance[rows]
        distance[rows] = torch.where(closer, values, distance[rows])
        index[rows] = torch.where(closer, places + columns.start, index[rows])
    return Nearest(distance.sqrt(), index)


def share_nearer(generated: Tensor, held_out: Tensor) -> float:
    """The probability that a generated image is nearer to a training image than a held-out one is; ties count half.

    Arguments are distances (N,) and (M,) to the nearest training image. 0.5 means that generated images are as new as
    unseen real ones; towards 1, they are copies. The statistic of Meehan et al., "A Non-Parametric Test to Detect
    Data-Copying" (arXiv 2004.05675), computed over the whole space.
    """
    ordered = held_out.sort().values
    below = torch.searchsorted(ordered, generated.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, generated.contiguous(), right=True)
    return 1 - float((below + not_above).double().mean()) / (2 * len(held_out))


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared float32 distances between rows of `x` and rows of `y`, with the ranges of rows of each tile.

    Centred on the mean of `y`: |x|^2 + |y|^2 - 2 x.y loses as many digits as the norms are larger than distances.
    """
    centre = y.mean(0)
    for i in range(0, len(x), TILE):
        rows = slice(i, min(i + TILE, len(x)))
        a = x[rows] - centre
        norms = a.square().sum(1, keepdim=True)
        for j in range(0, len(y), TILE):
            columns = slice(j, min(j + TILE, len(y)))
            b = a if x is y and rows == columns else y[columns] - centre
            distance = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(norms)
            yield rows, columns, distance.clamp_(min=0)
