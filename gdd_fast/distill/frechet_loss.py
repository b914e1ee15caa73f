"""The Frechet distance between generated and real features as a loss (Yang et al., arXiv 2604.28190).

A distance needs the statistics of tens of thousands of images, but gradients fit through a few hundred only. So the
statistics are those of the latest generated images, kept as features, and gradients flow through the batch alone.

For statistics (mu, S) of that population and (m, R) of the data, the distance d is |mu - m|^2 + tr(S + R - 2 (S
R)^(1/2)), and its first variation at a feature f is |f|^2 - 2 f . T(f) up to terms without gradient in f, where T(f) =
m + R^(1/2) (R^(1/2) S R^(1/2))^(-1/2) R^(1/2) (f - mu) is the optimal transport map from one Gaussian to the other. So
the gradient of d in one feature of the population, times the population's size, is 2 (f - T(f)). The statistics are
constant within a batch; the batch joins the population after the step.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.errors import ConfigError, DataError
from gdd_fast.metrics.features import FeatureExtractor
from gdd_fast.metrics.frechet import Statistics


class FrechetLoss(nn.Module):
    """The loss in one feature network; `state_dict()` is what a checkpoint keeps.

    Args:
        extractor: computes the features.
        data: their statistics on real images.
        population: how many of the latest generated images to keep.

    Raises `ConfigError` unless the population is larger than the number of features: otherwise its covariance is
    singular, where the distance has no gradient. Raises `DataError` for data whose features do not vary.
    """

    features: Tensor
    """Float32 (population, F); new features replace those from index `oldest` on."""
    oldest: Tensor
    total: Tensor
    """Sums over the population of x and of x x^T, for x = feature - the data's mean: `products`. Float64."""
    products: Tensor
    mean: Tensor
    """The population's mean at the last `refresh`, with T's matrix `transport` and the `distance` from then."""
    transport: Tensor
    distance: Tensor
    filled: Tensor

    def __init__(self, extractor: FeatureExtractor, data: Statistics, population: int) -> None:
        super().__init__()
        if population <= data.dim:
            raise ConfigError(
                f"--frechet-population {population}: {extractor.name} has {data.dim} features, and their "
                "covariance needs more images than that"
            )
        self.extractors = (extractor,)  # in a tuple, to keep it out of the state
        device = extractor.device
        mean, covariance = data.mean.to(device), data.covariance.to(device)
        self.variance = float(covariance.trace())
        if not self.variance > 0:
            raise DataError(f"the {extractor.name} features of the data do not vary: no distance to them is defined")
        values, vectors = torch.linalg.eigh(covariance)
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._data_mean = mean
        double: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.register_buffer("features", torch.zeros(population, data.dim, device=device))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(data.dim, **double))
        self.register_buffer("products", torch.zeros(data.dim, data.dim, **double))
        self.register_buffer("mean", torch.zeros(data.dim, **double))
        self.register_buffer("transport", torch.zeros(data.dim, data.dim, **double))
        self.register_buffer("distance", torch.zeros((), **double))
        self.register_buffer("filled", torch.zeros((), dtype=torch.bool))

    def fill(self, features: Tensor) -> None:
        """Set the population, float32 (population, F). Raises `ConfigError` for another shape."""
        if features.shape != self.features.shape:
            raise ConfigError(f"a population of {tuple(self.features.shape)} features, not {tuple(features.shape)}")
        self.features.copy_(features)
        x = self.features.double()
        # sums about the data's mean, which is close, so that the covariance computed from them loses no digits
        x -= self._data_mean
        self.total.copy_(x.sum(0))
        self.products.copy_(x.T @ x)
        self.filled.fill_(True)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Replace the oldest features by these, (N, F); of more than the population holds, the last are kept."""
        features = features[-len(self.features) :].to(self.features)
        places = (int(self.oldest) + torch.arange(len(features), device=features.device)) % len(self.features)
        old, new = (x.double() - self._data_mean for x in (self.features[places], features))
        self.total += new.sum(0) - old.sum(0)
        self.products += new.T @ new - old.T @ old
        self.features[places] = features
        self.oldest.fill_((int(self.oldest) + len(features)) % len(self.features))

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the statistics of the current population: the distance, and the map T that says where a feature
        should move."""
        count = len(self.features)
        shift = self.total / count
        covariance = (self.products - count * torch.outer(shift, shift)) / (count - 1)
        values, vectors = torch.linalg.eigh(self._root @ covariance @ self._root)
        carried = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        roots = values.clamp(min=0).sqrt()
        half = self._root @ vectors
        self.transport.copy_((half * torch.where(carried, 1 / roots, 0)) @ half.T)
        self.mean.copy_(self._data_mean + shift)
        self.distance.copy_(shift.square().sum() + covariance.trace() + self.variance - 2 * roots.sum())

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) -> (N,): for each, the distance at the last `refresh` divided by the data's variance.

        The gradient in a feature is 2 (f - T(f)), also divided by the variance.
        """
        x = features.detach().double()
        away = 2 * (x - self._data_mean - (x - self.mean) @ self.transport)
        moves = (features * (away / self.variance).to(features)).sum(1)
        return moves - moves.detach() + (self.distance / self.variance).to(features)

    def features_of(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) in [-1, 1] -> (N, F), differentiable."""
        pixels = (images + 1) * 127.5
        if self.extractors[0].network is not None:  # networks take three channels; the "pixels" features take any
            pixels = pixels.expand(-1, 3, -1, -1)
        return self.extractors[0].features(pixels)
