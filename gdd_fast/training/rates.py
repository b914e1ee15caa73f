"""Learning rates that decay over a run."""

import torch


class RateDecay:
    """Learning rates times `1 / sqrt(max(images / reference, 1))` (Karras et al. 2024, arXiv 2312.02696, eq. 67).

    They depend on the images seen alone: a run that is extended or resumed continues as if it had never stopped.

    Args:
        optimizers: whose groups have the initial learning rates now.
        reference: images after which the rates start to decay; 0: they stay constant.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer, reference: float) -> None:
        self._start = [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in optimizers]
        self._reference = reference

    def set(self, images: int) -> None:
        """Set the rates for the step that follows `images` images."""
        factor = (self._reference / max(images, self._reference)) ** 0.5 if self._reference else 1.0
        for optimizer, rates in self._start:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
