"""The discriminator of a distillation and the GAN losses, which the steps differentiate."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gdd_fast.config import LossConfig
from gdd_fast.device import gpu_arithmetic
from gdd_fast.distill.losses import discriminator_loss, generator_loss, mean_and_positive, r1_penalty
from gdd_fast.models.discriminator import DiscriminatorHeads, ProjectedFeatures

Features = list[list[Tensor]]
"""The output of `ProjectedFeatures`: for each backbone, its maps."""


def logged(logits: Tensor) -> dict[str, Tensor]:
    """The values for the log from the summary of logits, (4,), that `Adversary.told_apart` returns."""
    fake_mean, fake_positive, real_mean, real_positive = logits.unbind()
    return {
        "logit_fake": fake_mean,
        "logit_real": real_mean,
        "sign_accuracy_fake": 1 - fake_positive,
        "sign_accuracy_real": real_positive,
    }


class Adversary:
    """Frozen `features`, `r1_features` in the dtype of the R1 step (or the same object), and `heads`, which train.

    `batch` is the number of images per step and process over which a loss is taken; a micro-batch gives its share.
    """

    def __init__(
        self,
        features: ProjectedFeatures,
        r1_features: ProjectedFeatures,
        heads: DiscriminatorHeads,
        config: LossConfig,
        batch: int,
    ) -> None:
        self.features, self.r1_features, self.heads = features, r1_features, heads
        self._config, self._batch = config, batch
        # the class table of conditional heads may be frozen permanently
        self.weights = [p for p in heads.parameters() if p.requires_grad]

    def train_heads(self, train: bool) -> None:
        """Switch gradients of the heads on or off; while off, autograd does not compute them."""
        for weight in self.weights:
            weight.requires_grad_(train)

    @torch.no_grad()
    def seen(self, images: Tensor) -> Features:
        """Features of images, without gradients."""
        return self.features(images)

    def fooled(self, features: Features, label: Tensor | None) -> Tensor:
        """The loss of G, from the features of its images."""
        return generator_loss(self.heads(features, label), self._config.logit_reduction, self._batch)

    def told_apart(self, fakes: Features, real: Features, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of D, and `mean_and_positive` of its logits for fakes, then for real images, (4,)."""
        # separately, as batch norm must not mix them
        fake, true = self.heads(fakes, label), self.heads(real, label)
        loss = discriminator_loss(fake, true, self._config.logit_reduction, self._batch)
        return loss, torch.stack([*mean_and_positive(fake), *mean_and_positive(true)])

    def gradient_penalty(self, real: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of the R1 step, and the mean unweighted penalty; call it within `r1_arithmetic`."""
        real = real.detach().requires_grad_()
        penalty = r1_penalty(real, self.heads(self.r1_features(real), label))
        weight = self._config.r1_gamma / 2 * self._config.r1_interval / self._batch
        return penalty.sum() * weight, penalty.detach().mean()

    @contextlib.contextmanager
    def r1_arithmetic(self) -> Iterator[None]:
        """For a block, the heads compute in the dtype of `r1_features`."""
        before, self.heads.dtype = self.heads.dtype, self.r1_features.dtype
        try:
            with gpu_arithmetic(self._config.r1_precision):
                yield
        finally:
            self.heads.dtype = before
