"""Moving average of a network's weights, which is what is sampled from. The optimizer's step updates it."""

import copy

from torch import Tensor, nn


class Ema:
    """Exponential moving average with a half-life in images and a ramp-up.

    After `images` real images, one update with `batch` images moves the average by `1 - 0.5 ** (batch / h)` towards
    the network, `h = min(halflife, rampup * images)` (Karras et al. 2022, appendix F.2; `rampup = 0`: `h = halflife`).
    Frozen parameters never move, so only trainable ones are averaged.

    Args:
        net: the network that trains; call `freeze` on it first.
        halflife: number of images after which an old weight counts half.
        rampup: upper bound of the half-life as a fraction of the images seen; 0: no bound.
    """

    def __init__(self, net: nn.Module, halflife: float, rampup: float) -> None:
        self.halflife, self.rampup = halflife, rampup
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._trained = net

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The averages by trained parameter, as `AdamEma` takes them, for the current parameters of both networks."""
        pairs = zip(self._trained.parameters(), self.net.parameters(), strict=True)
        return {p: a for p, a in pairs if p.requires_grad}

    def decay(self, images: int, batch: int) -> float:
        """Weight of the old average in the update that follows `images` images."""
        halflife = min(self.halflife, self.rampup * images) if self.rampup else self.halflife
        return 0.5 ** (batch / max(halflife, 1e-8))
