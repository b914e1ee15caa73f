"""Noise schedules defined by betas: DDPM (Ho et al., arXiv 2006.11239) and samplers for networks trained like it.

x_t = a_t x0 + s_t n with a_t^2 = alphas_cumprod[t] and s_t^2 = 1 - a_t^2, so sigma_t = s_t / a_t and the network reads
x / sqrt(1 + sigma^2) = a_t x. Between the times of training, time is linear in log sigma.

    epsilon         D = x - sigma F
    v_prediction    D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F         (Salimans & Ho, arXiv 2202.00512)
    sample          D = F
"""

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.teachers.parametrisation import Coefficients, Parametrisation, choose

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
MAX_TIMES = 1_000_000
# Stands for no signal at all, the last time of a schedule with zero terminal SNR: diffusers' Euler samplers replace
# alphas_cumprod = 0 by 2^-24.
NO_SIGNAL = 2.0**12


class VariancePreserving(Parametrisation):
    """Arguments as for diffusers' DDPMScheduler, which computes the table."""

    kind = "vp"

    def __init__(
        self,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        from diffusers import DDPMScheduler

        self.prediction_type = choose("prediction_type", prediction_type, PREDICTIONS)
        if trained_betas is None:
            choose("beta_schedule", beta_schedule, SCHEDULES)
        if not isinstance(num_train_timesteps, int) or not 2 <= num_train_timesteps <= MAX_TIMES:
            raise ConfigError(f"num_train_timesteps must be 2 to {MAX_TIMES}, got {num_train_timesteps!r:.100}.")
        self._options: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": None if trained_betas is None else list(trained_betas),
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        with torch.device("cpu"):
            alphas = DDPMScheduler(**self._options).alphas_cumprod.double()  # type: ignore[attr-defined]
            sigmas = ((1 - alphas) / alphas).sqrt()
            if sigmas[-1].isinf():
                sigmas[-1] = max(NO_SIGNAL, 2 * float(sigmas[-2]))
        if not bool((sigmas[1:] > sigmas[:-1]).all() and (sigmas > 0).all() and sigmas.isfinite().all()):
            raise ConfigError("the betas do not give noise levels that increase with time.")
        self._tables = {sigmas.device: sigmas.log()}
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self.predicts_noise = prediction_type == "epsilon"

    def __deepcopy__(self, memo: dict[int, Any]) -> "VariancePreserving":
        """Copies share the constant table: among tensors without values, a copied table would lose its own."""
        twin = copy.copy(self)
        twin._tables = dict(self._tables)
        return twin

    def coefficients(self, sigma: Tensor) -> Coefficients:
        norm = (1 + sigma.square()).sqrt()
        scale = 1 / norm
        match self.prediction_type:
            case "epsilon":
                skip, out = torch.ones_like(sigma), -sigma
            case "v_prediction":
                skip, out = scale.square(), -sigma * scale
            case _:
                skip, out = torch.zeros_like(sigma), torch.ones_like(sigma)
        return Coefficients(skip, out, scale, self.time(sigma))

    def time(self, sigma: Tensor) -> Tensor:
        """Times float64 (N,) from 0 to T - 1, fractional in between, for noise levels float64 (N,).

        A noise level rounded to float32 still gives its exact time: times within a thousandth of a whole number are
        rounded to it.
        """
        levels, wanted = self._log_levels(sigma.device), sigma.log()
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        time = above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
        whole = time.round()
        return torch.where((time - whole).abs() < 1e-3, whole, time)

    def options(self) -> dict[str, Any]:
        return {"prediction_type": self.prediction_type, **self._options}

    def with_velocity(self) -> "VariancePreserving":
        """The same schedule for a network that predicts v."""
        return VariancePreserving("v_prediction", **self._options)

    def levels(self, device: torch.device) -> Tensor:
        """The noise levels of the training, float64 (T,), lowest first."""
        return self._log_levels(device).exp()

    def _log_levels(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    @classmethod
    def options_of(cls, scheduler: dict[str, Any]) -> dict[str, Any] | None:
        if "beta_schedule" not in scheduler:
            return None
        if scheduler.get("use_flow_sigmas"):
            raise ConfigError("use_flow_sigmas cannot be distilled from: its times are those of a flow.")
        return {name: scheduler[name] for name in signature(cls).parameters if name in scheduler}
