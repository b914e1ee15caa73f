"""Converts any source to a data set in this package's formats."""

from collections.abc import Iterator
from pathlib import Path

from gdd_fast.data.dataset import Progress
from gdd_fast.data.parallel import ordered_map
from gdd_fast.data.sources import Source
from gdd_fast.data.transform import Transform
from gdd_fast.data.writer import Item, write_dataset
from gdd_fast.errors import ConfigError, DataError


def convert(
    source: Source,
    dest: Path,
    transform: Transform,
    *,
    max_images: int | None = None,
    progress: Progress | None = None,
    new: bool = False,
) -> tuple[int, ...]:
    """Write the first `max_images` images of `source` to `dest`, an EDM zip or an .npz by its suffix.

    Returns the shape (N, C, H, W) written; `new` as for `atomic_write`. Raises `DataError`, with `dest` left as it was,
    for an image that cannot be read or transformed or differs in shape, and `ConfigError` if `max_images` < 1.
    """
    if max_images is not None and max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, not {max_images}")
    count = source.size if max_images is None else min(max_images, source.size)
    shape = transform(source.image(0), source.name(0)).shape

    def items() -> Iterator[Item]:
        pixels = ordered_map(lambda index: transform(source.image(index), source.name(index)), range(count))
        for index, image in enumerate(pixels):
            if image.shape != shape:
                raise DataError(
                    f"{source.name(index)} comes out as {image.shape}, but {source.name(0)} as {shape} "
                    "(channels, height, width): set --resolution, or --color gray or rgb"
                )
            yield image, None if source.labels is None else int(source.labels[index])
            if progress is not None:
                progress(index + 1, count)

    write_dataset(dest, items(), new=new)
    return count, *shape
