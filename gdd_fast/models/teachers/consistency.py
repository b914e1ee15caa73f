"""Consistency models (Song et al., arXiv 2303.01469, appendix C), diffusers' CMStochasticIterativeScheduler.

EDM's coefficients with sigma - sigma_min in skip and out, so that D(x; sigma_min) = x, and time = 250 ln(sigma +
1e-44). Such a network already generates in one step; distilling improves its images.
"""

from torch import Tensor

from gdd_fast.models.teachers.karras import Karras
from gdd_fast.models.teachers.parametrisation import Coefficients


class Consistency(Karras):
    """Arguments as for CMStochasticIterativeScheduler."""

    kind = "consistency"
    schedulers = ("CMStochasticIterativeScheduler",)

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        super().__init__(sigma_min, sigma_max, sigma_data)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        variance = self.sigma_data**2
        offset = sigma - self.sigma_min
        norm = (sigma.square() + variance).sqrt()
        time = 1000 * 0.25 * (sigma + 1e-44).log()
        return Coefficients(variance / (offset.square() + variance), offset * self.sigma_data / norm, 1 / norm, time)
