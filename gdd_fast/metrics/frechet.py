"""Mean and covariance of features, and the Frechet distance between two such statistics.

The distance is that of the two Gaussians with these moments (Heusel et al., arXiv 1706.08500):
`|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`.
"""

import numpy as np
import torch

from gdd_fast.errors import DataError

_ROUNDING = 1e-6
"""Fraction of a covariance's trace by which float32 files may be off."""


class Statistics:
    """Float64 mean and covariance (N - 1) of a stream of features of `dim` dimensions.

    Updates are centred on the running mean (Chan, Golub & LeVeque 1979), so that a mean far from zero costs no digits.
    `features` names what was measured (`FeatureExtractor.name`), `image_shape` is the `(C, H, W)` of the images, None
    if unknown. Statistics that differ in either are never compared: feature networks resize images of any size to their
    own.
    """

    def __init__(
        self,
        dim: int,
        features: str = "",
        device: torch.device | str = "cpu",
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.features = features
        self.image_shape = image_shape
        self.count: int | None = 0
        """Samples seen; `None` when loaded from a file that does not say."""
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        """Float64 `(dim,)`."""
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """Float64 `(dim, dim)`. Raises `DataError` with fewer than two samples."""
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images, not {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch, floating point `(N, dim)`. Raises `DataError` for NaN or infinite features."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(f"expected features (N, {self.dim}), got {tuple(features.shape)}")
        check_finite(features, self.features)
        if len(features) == 0:
            return
        if self.count is None:
            raise DataError("statistics without a count cannot be added to")
        x = features.to(self.mean)
        mean, total = x.mean(0), self.count + len(x)
        delta = mean - self.mean
        # The shift between the two means is one more row of the centred samples.
        rows = torch.cat([x - mean, (delta * (self.count * len(x) / total) ** 0.5)[None]])
        self._scatter.addmm_(rows.T, rows)
        self.mean += delta * (len(x) / total)
        self.count = total

    @classmethod
    def of_moments(
        cls,
        mu: np.ndarray,
        sigma: np.ndarray,
        features: str = "",
        count: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> "Statistics":
        """From a mean (F,) and a covariance (F, F), floating point; `count` None if unknown.

        Raises `DataError` for other shapes and dtypes, for values that are not finite, and for a matrix that is not
        symmetric or has negative eigenvalues, beyond rounding.
        """
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
            raise DataError(
                f"mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape} are not a mean and covariance"
            )
        mu, sigma = (torch.from_numpy(array.astype(np.float64)) for array in (mu, sigma))
        if not (bool(mu.isfinite().all()) and bool(sigma.isfinite().all())):
            raise DataError("mu or sigma hold NaN or infinite values")
        check_covariance(sigma)
        statistics = cls(len(mu), features, image_shape=image_shape)
        statistics.mean.copy_(mu)
        statistics._scatter.copy_(sigma if count is None else sigma * (count - 1))
        statistics.count = count
        return statistics

    def _check_comparable(self, other: "Statistics") -> None:
        if self.features and other.features and self.features != other.features:
            raise DataError(f"features {self.features!r} and {other.features!r} cannot be compared")
        if self.image_shape and other.image_shape and self.image_shape != other.image_shape:
            raise DataError(f"statistics of images {self.image_shape} and {other.image_shape} cannot be compared")
        if self.dim != other.dim:
            raise DataError(f"features of {self.dim} and {other.dim} dimensions cannot be compared")


def check_finite(features: torch.Tensor, name: str) -> None:
    """Raise `DataError` for features (N, F), called `name`, that contain NaN or infinities."""
    if not bool(features.isfinite().all()):
        raise DataError(
            f"{name or 'the'} features of {len(features)} images hold NaN or infinite values: "
            "the images or the feature network's weights are broken"
        )


def check_covariance(sigma: torch.Tensor) -> None:
    """Raise `DataError` unless float64 `sigma` (F, F) is symmetric and positive semidefinite, up to rounding."""
    tolerance = _ROUNDING * float(sigma.diagonal().abs().sum())
    if float((sigma - sigma.T).abs().max()) > tolerance:
        raise DataError("sigma is not symmetric, so it is not a covariance")
    # A Cholesky factorisation tells faster than eigenvalues whether the smallest of these is above -tolerance.
    shifted = sigma + max(tolerance, torch.finfo(sigma.dtype).tiny) * torch.eye(len(sigma), dtype=sigma.dtype)
    if bool((sigma.diagonal() < -tolerance).any()) or bool(torch.linalg.cholesky_ex(shifted).info):
        raise DataError("sigma has negative eigenvalues, so it is not a covariance")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance, as FID reports it; 0 for equal statistics, never negative.

    With factors `S = L L^T`, the trace of `(S1 S2)^(1/2)` is the nuclear norm of `L1^T L2`: no matrix square root, no
    complex numbers, and no special case for fewer samples than dimensions. Raises `DataError` for statistics of
    different features or image sizes, or of fewer than two samples.
    """
    a._check_comparable(b)
    first, second = a.covariance, b.covariance.to(a.mean.device)
    overlap = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    distance = shift + first.trace() + second.trace() - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """`L` such that `L L^T` is the covariance: by Cholesky or, if singular, by eigenvectors with nonzero values."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    carried = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, carried] * values[carried].sqrt()
