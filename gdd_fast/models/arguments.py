"""Checks of the U-Nets' arguments: each raises one ConfigError that names the argument and what it may be."""

from collections.abc import Sequence

from gdd_fast.errors import ConfigError


def check_sizes(img_resolution: int, channel_mult: Sequence[int], **sizes: int) -> None:
    """Positive whole numbers, and a resolution that can be halved once a multiplier after the first."""
    if not isinstance(channel_mult, list | tuple) or not channel_mult:
        raise ConfigError(f"channel_mult must be a list with one multiplier a resolution, got {channel_mult!r}.")
    sizes |= {"img_resolution": img_resolution} | {f"channel_mult[{i}]": mult for i, mult in enumerate(channel_mult)}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")
    step = 2 ** (len(channel_mult) - 1)
    if img_resolution % step:
        raise ConfigError(
            f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times: make it a multiple of "
            f"{step}, or give channel_mult fewer entries."
        )


def check_resolutions(attn_resolutions: Sequence[int]) -> None:
    if not isinstance(attn_resolutions, list | tuple) or not all(isinstance(size, int) for size in attn_resolutions):
        raise ConfigError(f"attn_resolutions must be a list of whole numbers, got {attn_resolutions!r}.")


def check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a probability, 0 to 1, got {value!r}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
