"""Wraps diffusion models of other libraries as denoisers D(x; sigma), so that they can be distilled.

A teacher is a diffusers U-Net (`unet2d`) with one of the parametrisations below, which say what the network reads and
what its output means at a noise level. Each is in a file of its own and has a line here. Read the files in this order:
`parametrisation` (the interface), `variance_preserving`, the others, `unet2d`.
"""

from typing import Any

from gdd_fast.errors import ConfigError
from gdd_fast.models.teachers.consistency import Consistency
from gdd_fast.models.teachers.karras import Karras
from gdd_fast.models.teachers.parametrisation import Parametrisation
from gdd_fast.models.teachers.variance_exploding import VarianceExploding
from gdd_fast.models.teachers.variance_preserving import VariancePreserving

__all__ = ["PARAMETRISATIONS", "Parametrisation", "make_parametrisation", "parametrisation_of"]

PARAMETRISATIONS: dict[str, type[Parametrisation]] = {
    "vp": VariancePreserving,
    "ve": VarianceExploding,
    "edm": Karras,
    "consistency": Consistency,
}


def make_parametrisation(config: dict[str, Any]) -> Parametrisation:
    """The parametrisation that `Parametrisation.config` described. Raises ConfigError if there is no such one."""
    if not isinstance(config, dict) or config.get("kind") not in PARAMETRISATIONS:
        raise ConfigError(f"the parametrisation's kind must be one of {', '.join(PARAMETRISATIONS)}, got {config!r}.")
    options = {name: value for name, value in config.items() if name != "kind"}
    try:
        return PARAMETRISATIONS[config["kind"]](**options)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the parametrisation {config['kind']} cannot be made: {reason}") from error


def parametrisation_of(scheduler: dict[str, Any]) -> dict[str, Any]:
    """`Parametrisation.config` for the configuration of a diffusers scheduler.

    Raises a ConfigError that names the setting for a scheduler or setting that no parametrisation supports.
    """
    for kind, cls in PARAMETRISATIONS.items():
        options = cls.options_of(scheduler)
        if options is not None:
            return {"kind": kind, **options}
    raise ConfigError(
        f"the scheduler {scheduler.get('_class_name')!r:.100} cannot be distilled from: it needs a beta_schedule "
        "(DDPM, DDIM, DPM-Solver, Euler, ...), or has to be ScoreSdeVe, EDM's or a consistency model's."
    )
