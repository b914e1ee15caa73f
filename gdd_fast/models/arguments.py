"""Checks of the U-Nets' arguments: each raises a ConfigError that names the argument and its allowed values.

The upper bounds are far beyond any network ever trained. They guard against arguments from a file: within them a
network is built in seconds (on PyTorch's meta device, which takes no memory for weights) and no size overflows, so that
the file's arguments can be compared with its tensors.
"""

import math
from collections.abc import Sequence

from gdd_fast.errors import ConfigError

MAX_SIZE = 2**17  # channels, classes, pixels per side
MAX_IMAGE = 2**28  # values of one image
MAX_BLOCKS = 512  # EDM's largest network has 44 by this count
MAX_LEVELS = 16
MAX_TAPS = 32


def check_sizes(
    img_resolution: int,
    channel_mult: Sequence[int],
    *,
    in_channels: int,
    model_channels: int,
    num_blocks: int,
    label_dim: int,
    augment_dim: int,
    **sizes: int,
) -> None:
    """Check that sizes are whole numbers in range, and that the resolution can be halved once per further multiplier.

    `label_dim` and `augment_dim` may be 0; everything else is positive. `sizes` named `channel_mult_...` multiply
    `model_channels`.
    """
    if not isinstance(channel_mult, list | tuple) or not 1 <= len(channel_mult) <= MAX_LEVELS:
        raise ConfigError(
            f"channel_mult must be a list with one multiplier per resolution, at most {MAX_LEVELS}, "
            f"got {channel_mult!r:.100}."
        )
    multipliers = {f"channel_mult[{i}]": mult for i, mult in enumerate(channel_mult)}
    multipliers |= {name: size for name, size in sizes.items() if name.startswith("channel_mult_")}
    own = {"in_channels": in_channels, "model_channels": model_channels, "num_blocks": num_blocks}
    for name, value in ({"img_resolution": img_resolution} | own | sizes | multipliers).items():
        _check_range(name, value, 1)
    for name, value in {"label_dim": label_dim, "augment_dim": augment_dim}.items():
        _check_range(name, value, 0)
    for name, mult in multipliers.items():
        if model_channels * mult > MAX_SIZE:
            raise ConfigError(f"model_channels * {name} is {model_channels * mult}, more than {MAX_SIZE}.")
    if in_channels * img_resolution**2 > MAX_IMAGE:
        raise ConfigError(f"an image of {in_channels} x {img_resolution}^2 has more than {MAX_IMAGE} values.")
    if len(channel_mult) * (2 * num_blocks + 3) > MAX_BLOCKS:  # the encoder's, the decoder's and those that resample
        raise ConfigError(
            f"num_blocks {num_blocks} at {len(channel_mult)} resolutions makes more than {MAX_BLOCKS} blocks."
        )
    step = 2 ** (len(channel_mult) - 1)
    if img_resolution % step:
        raise ConfigError(
            f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times: make it a multiple of "
            f"{step}, or give channel_mult fewer entries."
        )


def _check_range(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or not least <= value <= MAX_SIZE:
        kind = f"{'a positive' if least else 'a'} whole number of at most {MAX_SIZE}"
        raise ConfigError(f"{name} must be {kind}, got {value!r:.100}.")


def check_resolutions(attn_resolutions: Sequence[int]) -> None:
    if (
        not isinstance(attn_resolutions, list | tuple)
        or not all(isinstance(size, int) for size in attn_resolutions)
        or len(attn_resolutions) > MAX_LEVELS
    ):
        raise ConfigError(
            f"attn_resolutions must be a list of at most {MAX_LEVELS} whole numbers, got {attn_resolutions!r:.100}."
        )


def check_filter(resample_filter: Sequence[float]) -> None:
    if (
        not isinstance(resample_filter, list | tuple)
        or len(resample_filter) > MAX_TAPS
        or not all(isinstance(tap, int | float) and math.isfinite(tap) for tap in resample_filter)
    ):
        raise ConfigError(
            f"resample_filter must be a list of at most {MAX_TAPS} finite numbers, got {resample_filter!r:.100}."
        )


def check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a probability, 0 to 1, got {value!r:.100}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r:.100}.")
