"""The interface: what a network reads and what its output means at each noise level.

Every diffusion model that was trained at x_t = a_t x0 + s_t n is a denoiser of x = x0 + sigma n, sigma = s_t / a_t
(Karras et al., arXiv 2206.00364, appendix C). With F the network,

    D(x; sigma) = skip(sigma) x + out(sigma) F(scale(sigma) x + shift, time(sigma))

and a parametrisation is these five. They are computed in float64: time has to be exact at the times of training, and
`out` is as large as sigma where F predicts noise.
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
    """One way of predicting. The constructor's arguments are named as schedulers' configurations have them.

    Attributes:
        schedulers: classes of diffusers' whose networks it is of.
        sigma_min, sigma_max: lowest and highest noise level of the training.
        predicts_noise: whether the image is x minus noise that the network predicts, so that all its errors are sigma
            times larger there.
    """

    kind: ClassVar[str]
    schedulers: ClassVar[tuple[str, ...]] = ()
    sigma_min: float
    sigma_max: float
    predicts_noise: bool = False

    @property
    def sigma_init(self) -> float:
        """The noise level from which a generator of one step starts, unless another is asked for; docs/teachers.md.

        Lower where noise is predicted: every error of F, by rounding or an update, is sigma times larger in the image.
        """
        return min(NOISE_SIGMA_INIT if self.predicts_noise else SIGMA_INIT, self.sigma_max)

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """`sigma` float64 (N,), positive."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in JSON's types."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    @classmethod
    def options_of(cls, scheduler: dict[str, Any]) -> dict[str, Any] | None:
        """Constructor's arguments from a scheduler's configuration; None if it is another parametrisation's.

        Raises ConfigError for a setting that no argument stands for and that cannot be served.
        """
        if scheduler.get("_class_name") not in cls.schedulers:
            return None
        return {name: scheduler[name] for name in signature(cls).parameters if name in scheduler}

    def config(self) -> dict[str, Any]:
        """What `make_parametrisation` makes it from."""
        return {"kind": self.kind, **self.options()}


def choose(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`; else a ConfigError that names the setting."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r:.100} cannot be distilled from: it has to be {' or '.join(choices)}.")
    return value
