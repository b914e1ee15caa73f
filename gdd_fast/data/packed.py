"""How far a file within an archive may unpack."""

_ALWAYS = 64 << 20
_RATIO = 100


def check_expansion(size: int, compressed: int) -> None:
    """Raise `ValueError` for a file of `size` bytes that unpacks from too few: photographs, and even drawings, do not.

    Without this, an archive of a few megabytes can fill any memory. Up to 64 MiB everything is taken.
    """
    if size > max(_ALWAYS, _RATIO * compressed):
        raise ValueError(f"{compressed:,} bytes would unpack to {size:,}, which no data set does")
