"""The exclusive GAN loss of GDD and its R1 penalty.

Logits come from `DiscriminatorHeads` as a list over backbones of lists over heads of tensors (N, P): one logit per
image and position. Non-saturating loss: Goodfellow et al. 2014; R1: Mescheder et al. 2018, equation 9.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gdd_fast.config import Reduction

Logits = list[list[Tensor]]


def reduce_logits(values: Logits, reduction: Reduction, batch: int) -> Tensor:
    """A scalar from per-position losses, for one micro-batch of this rank's batch of `batch` images.

    `rows`: per backbone and image, the mean over all positions of all heads, summed over images and backbones. This is
    what the public code computes (it iterates over a tensor as if it were a list). With B images and K backbones its
    gradient is K * B times that of a mean; Adam cancels this factor, but R1's share of the loss shrinks by it. `heads`:
    per head, the mean over positions and images, summed over heads and backbones.

    With either, the values of micro-batches add up to that of the whole batch.
    """
    if reduction == "rows":
        return torch.stack([torch.cat(heads, dim=1).float().mean(dim=1).sum() for heads in values]).sum()
    return torch.stack([head.float().mean(dim=1).sum() / batch for heads in values for head in heads]).sum()


def _map(function: Callable[[Tensor], Tensor], logits: Logits) -> Logits:
    return [[function(head.float()) for head in heads] for heads in logits]


def generator_loss(fake: Logits, reduction: Reduction, batch: int) -> Tensor:
    """softplus(-D(G(z)))."""
    return reduce_logits(_map(lambda x: F.softplus(-x), fake), reduction, batch)


def discriminator_loss(fake: Logits, real: Logits, reduction: Reduction, batch: int) -> Tensor:
    """softplus(D(G(z))) + softplus(-D(x))."""
    fooled = reduce_logits(_map(F.softplus, fake), reduction, batch)
    return fooled + reduce_logits(_map(lambda x: F.softplus(-x), real), reduction, batch)


def r1_penalty(images: Tensor, logits: Logits) -> Tensor:
    """||d sum(logits) / d images||^2 per image, shape (N,), differentiable with respect to the discriminator.

    Only the images' gradient is requested, so autograd computes no weight gradients in this inner pass.
    """
    total = torch.stack([head.float().sum() for heads in logits for head in heads]).sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3))


def mean_and_positive(logits: Logits) -> tuple[Tensor, Tensor]:
    """The mean of all logits and the share above zero (images taken to be real), detached scalars for the log."""
    flat = torch.cat([head.detach().float().flatten() for heads in logits for head in heads])
    return flat.mean(), (flat > 0).float().mean()
