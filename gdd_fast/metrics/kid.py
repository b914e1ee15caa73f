"""The kernel distance (Binkowski et al., arXiv 1801.01401): an unbiased squared MMD with a cubic kernel.

Unlike a Frechet distance, its expectation does not depend on the number of images; only its deviation does.
"""

import numpy as np
import torch
from torch import Tensor

from gdd_fast.errors import DataError

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    generated: Tensor, real: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation over `subsets` pairs of subsets of features (N, F) and (M, F), on one device.

    The kernel is `(x . y / F + 1)^3`. Subsets are drawn as in torch-fidelity, so that the two agree on the same
    features. If a set is smaller than `subset_size`, subsets have the size of the smaller set. Raises `DataError` for
    fewer than two images.
    """
    size = min(subset_size, len(generated), len(real))
    if size < 2:
        raise DataError(f"a kernel distance needs at least 2 images, not {size}")
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        parts = (
            x[torch.from_numpy(random.choice(len(x), size, replace=False)).to(x.device)] for x in (generated, real)
        )
        found.append(_squared_mmd(*parts))
    values = torch.stack(found).cpu().numpy()
    return float(values.mean()), float(values.std())


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    own = [_kernel(z, z) for z in (x, y)]
    within = sum(k.sum() - k.diagonal().sum() for k in own)
    return within / (n * (n - 1)) - 2 * _kernel(x, y).sum() / (n * n)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """float64 from the products on: the sums cancel up to their third digit."""
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3
