"""Mean and covariance of features, and the Frechet distance between two of them.

The distance is that of the two Gaussians with these moments (Heusel et al., arXiv 1706.08500):
`|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from gdd_fast.errors import DataError
from gdd_fast.files import atomic_write

# What NumPy raises on files that are not an .npz of plain arrays.
_READ_ERRORS = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


class Statistics:
    """Float64 mean and covariance (N - 1) of a stream of features of `dim` dimensions.

    Updated and merged around the running mean (Chan, Golub & LeVeque 1979), so that a mean far from zero costs no
    digits. `features` names what was measured (`FeatureExtractor.name`) and `image_shape` is the `(C, H, W)` of the
    images it was measured on, None where that is not known; two that differ are never compared: features resize images
    of any size to their own.
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
        if not bool(torch.isfinite(features).all()):
            raise DataError(
                f"{self.features or 'the'} features of {len(features)} images hold NaN or infinite values: "
                "the images or the feature network's weights are broken"
            )
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

    def all_reduce(self) -> None:
        """Give every rank of the default process group the statistics of all of them together."""
        if self.count is None:
            raise DataError("statistics without a count cannot be merged")
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        own, own_mean = count.clone(), self.mean.clone()
        torch.distributed.all_reduce(count)
        self.mean *= own / count.clamp(min=1)
        torch.distributed.all_reduce(self.mean)
        delta = own_mean - self.mean
        self._scatter.addmm_(own * delta[:, None], delta[None])
        torch.distributed.all_reduce(self._scatter)
        self.count = int(count)

    def save(self, path: str | Path) -> None:
        """Write an npz with `mu`, `sigma` (EDM's form), `n`, `features` and `image_shape`. Atomic."""
        known = {"n": self.count, "image_shape": self.image_shape}
        extra = {name: value for name, value in known.items() if value is not None}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            mu, sigma = self.mean.cpu().numpy(), self.covariance.cpu().numpy()
            np.savez(file, mu=mu, sigma=sigma, features=self.features, **extra)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote, or any npz with `mu` and `sigma`. Raises `DataError` for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                names = ("mu", "sigma", "n", "features", "image_shape")
                arrays = {name: file[name] for name in names if name in file}
        except FileNotFoundError:
            raise DataError(f"no statistics at {path}") from None
        except _READ_ERRORS as error:
            raise DataError(f"{path} is not an npz of statistics: {error}") from None
        return cls._from_arrays(arrays, path)

    @classmethod
    def _from_arrays(cls, arrays: dict[str, np.ndarray], path: str | Path) -> "Statistics":
        if not {"mu", "sigma"} <= arrays.keys():
            raise DataError(f"{path} holds no statistics: it needs arrays named mu and sigma")
        mu, sigma = arrays["mu"], arrays["sigma"]
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
            raise DataError(
                f"{path}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape} are no mean and covariance"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"{path}: mu or sigma hold NaN or infinite values")
        shape = arrays.get("image_shape", np.zeros(3, np.int64))
        count = arrays.get("n", np.array(2))
        if (shape.shape, count.shape, shape.dtype.kind, count.dtype.kind) != ((3,), (), "i", "i") or count < 2:
            raise DataError(f"{path}: n or image_shape are not a number of images, at least 2, and (C, H, W)")
        statistics = cls(len(mu), str(arrays.get("features", "")))
        if "image_shape" in arrays:
            statistics.image_shape = tuple(shape.tolist())
        statistics.mean.copy_(torch.from_numpy(mu.astype(np.float64)))
        statistics._scatter.copy_(torch.from_numpy(sigma.astype(np.float64)))
        statistics.count = None
        if "n" in arrays:
            statistics.count = int(arrays["n"])
            statistics._scatter *= statistics.count - 1
        return statistics

    def _check_comparable(self, other: "Statistics") -> None:
        if self.features and other.features and self.features != other.features:
            raise DataError(f"features {self.features!r} and {other.features!r} cannot be compared")
        if self.image_shape and other.image_shape and self.image_shape != other.image_shape:
            raise DataError(f"statistics of images {self.image_shape} and {other.image_shape} cannot be compared")
        if self.dim != other.dim:
            raise DataError(f"features of {self.dim} and {other.dim} dimensions cannot be compared")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance, as FID reports it; 0 for equal statistics, never negative.

    With factors `S = L L^T`, the trace of `(S1 S2)^(1/2)` is the nuclear norm of `L1^T L2`: no matrix square root, no
    complex numbers, and covariances of fewer samples than dimensions are no special case. Raises `DataError` for
    statistics of different features or of fewer than two samples.
    """
    a._check_comparable(b)
    first, second = a.covariance, b.covariance.to(a.mean.device)
    overlap = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    distance = shift + first.trace() + second.trace() - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """`L` with `L L^T` the covariance: Cholesky, or where it is singular its eigenvectors that carry anything."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    carried = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, carried] * values[carried].sqrt()
