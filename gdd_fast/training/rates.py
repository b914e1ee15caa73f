"""Learning rates that fall as a run goes on."""

import torch


class RateDecay:
    """Learning rates times `1 / sqrt(max(images / reference, 1))` (Karras et al. 2024, arXiv 2312.02696, eq. 67).

    It depends on the images seen alone: a run that is made longer, or resumed, goes on as if it had never ended.

    Args:
        optimizers: with the learning rates that they start from.
        reference: images after which the rates begin to fall; 0: they stay.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer, reference: float) -> None:
        self._start = [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in optimizers]
        self._reference = reference

    def set(self, images: int) -> None:
        """The rates of the step that follows `images` images."""
        factor = (self._reference / max(images, self._reference)) ** 0.5 if self._reference else 1.0
        for optimizer, rates in self._start:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
