"""Keys of metric values, `base` or `base-network`: which value is better, and how a key is shown."""

HIGHER_IS_BETTER = ("is", "precision", "recall", "f1", "density", "coverage")
TEACHER = "teacher_"
"""Prefix of the keys of the teacher's values."""


def higher_is_better(key: str) -> bool:
    """Whether higher values of the metric with this key are better; keys are such as `recall` or `recall-lite2-64`."""
    return key.partition("-")[0] in HIGHER_IS_BETTER


def is_better(key: str, value: float, than: float) -> bool:
    """Whether `value` of the metric with this key is better than another."""
    return value > than if higher_is_better(key) else value < than


def deviation_key(key: str) -> str:
    """The key of a value's standard deviation: `kid_std-lite2-64` for `kid-lite2-64`."""
    base, dash, network = key.partition("-")
    return f"{base}_std{dash}{network}"


def label(key: str) -> str:
    """How a key is shown to people: `FID`, `FD-lite0-64`, `recall-lite2-64`."""
    base, dash, rest = key.partition("-")
    return (base.upper() if base in ("fid", "fd", "kid", "is") else base) + dash + rest
