"""EDM's own parametrisation (Karras et al., arXiv 2206.00364, table 1) for diffusers networks.

With sd = sigma_data: D = sd^2 / (sigma^2 + sd^2) x + sigma sd / sqrt(sigma^2 + sd^2) F(x / sqrt(sigma^2 + sd^2),
ln(sigma) / 4). If diffusers calls the prediction v, F has the opposite sign.
"""

from typing import ClassVar

from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.teachers.parametrisation import Coefficients, Parametrisation, choose

PREDICTIONS = ("epsilon", "v_prediction")


class Karras(Parametrisation):
    """Arguments as for EDMEulerScheduler."""

    kind = "edm"
    schedulers: ClassVar[tuple[str, ...]] = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        prediction_type: str = "epsilon",
    ) -> None:
        if not (0 < sigma_min < sigma_max < float("inf") and 0 < sigma_data < float("inf")):
            raise ConfigError("sigma_min, sigma_max and sigma_data must be positive, and sigma_min below sigma_max.")
        self.prediction_type = choose("prediction_type", prediction_type, PREDICTIONS)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        variance = self.sigma_data**2
        norm = (sigma.square() + variance).sqrt()
        sign = 1 if self.prediction_type == "epsilon" else -1
        return Coefficients(variance / norm.square(), sign * sigma * self.sigma_data / norm, 1 / norm, sigma.log() / 4)
