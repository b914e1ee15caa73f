"""Everything a user can get wrong, one class per kind. Each message says what was wrong and what to do."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The values of `errno` for a full disk or quota, and for a file that is too large."""


class GddFastError(Exception):
    """Base of every error that is the input's fault and not the program's."""


class ConfigError(GddFastError, ValueError):
    """An option, or a combination of options, that cannot work."""


class InputError(GddFastError, ValueError):
    """A tensor of a shape, dtype or device that a function does not accept, or another unusable argument."""


class DataError(GddFastError, ValueError):
    """A data set that is missing, empty, corrupt or inconsistent."""


class WeightsError(GddFastError):
    """Weights that cannot be found, or do not fit the network."""


class UnsafePickleError(GddFastError):
    """A network pickle that holds something other than the tensors and settings of an EDM network."""


class CheckpointError(GddFastError):
    """A checkpoint that is incomplete, corrupt or from another configuration."""


class BackendError(GddFastError, RuntimeError):
    """An implementation of an operator that was requested by name and cannot run here."""


class DivergedError(GddFastError):
    """Training stopped because too many steps in a row had gradients that were not finite."""


class NotFiniteError(GddFastError):
    """`--debug-finite` has found a value that is not finite."""


class LostProcessError(GddFastError):
    """Another process of the same run ended early. That process's own message says what went wrong."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
