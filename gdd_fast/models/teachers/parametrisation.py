"""The interface of parametrisations: what a network reads and what its output means at each noise level.

Every diffusion model trained on x_t = a_t x0 + s_t n is a denoiser of x = x0 + sigma n with sigma = s_t / a_t (Karras
et al., arXiv 2206.00364, appendix C). With F the network,

    D(x; sigma) = skip(sigma) x + out(sigma) F(scale(sigma) x + shift, time(sigma))

and a parametrisation is these five functions. They are computed in float64: time has to be exact at the times of
training, and `out` is as large as sigma if F predicts noise.
"""

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from gdd_fast.errors import ConfigError
from gdd_fast.models.preconditioned import SIGMA_INIT

NOISE_SIGMA_INIT = 2.5


class Coefficients(NamedTuple):
    """skip, out, scale, time: float64 (N,), for N noise levels. shift: a number."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    time: Tensor
    shift: float = 0.0


class Parametrisation(ABC):
    """One kind of prediction. The constructor's arguments have the names in schedulers' configurations.

    Attributes:
        schedulers: diffusers' scheduler classes whose networks have this parametrisation.
        sigma_min, sigma_max: lowest and highest noise levels of the training.
        predicts_noise: whether the image is x minus predicted noise, so that errors are sigma times larger in the
        image.
    """

    kind: ClassVar[str]
    schedulers: ClassVar[tuple[str, ...]] = ()
    sigma_min: float
    sigma_max: float
    predicts_noise: bool = False

    @property
    def sigma_init(self) -> float:
        """The default noise level of a one-step generator; see docs/teachers.md.

        It is lower if noise is predicted: any error of F, by rounding or an update, is sigma times larger in the image.
        """
        return min(NOISE_SIGMA_INIT if self.predicts_noise else SIGMA_INIT, self.sigma_max)

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The coefficients at `sigma`, float64 (N,), positive."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON types."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    @classmethod
    def options_of(cls, scheduler: dict[str, Any]) -> dict[str, Any] | None:
        """The constructor's arguments from a scheduler's configuration; None if it belongs to another parametrisation.

        Raises ConfigError for a setting that is not supported.
        """
        if scheduler.get("_class_name") not in cls.schedulers:
            return None
        return {name: scheduler[name] for name in signature(cls).parameters if name in scheduler}

    def config(self) -> dict[str, Any]:
        """The configuration from which `make_parametrisation` makes this parametrisation."""
        return {"kind": self.kind, **self.options()}


def choose(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`, if it is one of `choices`; otherwise raises a ConfigError that names the setting."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r:.100} cannot be distilled from: it has to be {' or '.join(choices)}.")
    return value
