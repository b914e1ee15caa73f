"""The Inception score (Salimans et al., arXiv 1606.03498): how confident a classifier is, and in how many classes."""

import numpy as np
import torch
from torch import Tensor

from gdd_fast.errors import DataError

SPLITS = 10


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of `exp(E KL(p(y|x) || p(y)))`, from logits (N, classes).

    The images are shuffled first, as torch-fidelity does, since those of a data set may be sorted by class. Raises
    `DataError` with fewer images than parts.
    """
    n = len(logits)
    if n < splits:
        raise DataError(f"an Inception score of {splits} parts needs at least {splits} images, not {n}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    log_p = logits[order].double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = part.exp()
        scores.append(float((p * (part - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
