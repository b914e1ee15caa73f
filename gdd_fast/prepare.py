"""Make a training data set: `python -m gdd_fast.prepare --source cifar-10-python.tar.gz --dest cifar10-32x32.zip`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from gdd_fast.cli import command, start

with start(__name__):
    import numpy as np
    import tyro
    from tqdm import tqdm

    from gdd_fast.data.conversion import convert
    from gdd_fast.data.sources import Labels, Split, open_source
    from gdd_fast.data.transform import Transform
    from gdd_fast.errors import ConfigError
    from gdd_fast.files import check_destination
    from gdd_fast.settings import Settings


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Convert images to a training data set: all of one size, gray or RGB, lossless."""

    source: Path
    """Folder or zip of images, CIFAR-10 Python archive, folder with idx files of the MNIST family, or .npz."""
    dest: Path
    """The data set to write: a .zip in EDM's format, or an .npz."""
    split: Split = "train"
    """Which part of a CIFAR-10 archive or of idx files; other sources have no parts."""
    labels: Labels = "auto"
    """`auto`: those that the source states, if any; `folders`: one class per first-level folder; `none`."""
    transform: Annotated[Transform, tyro.conf.arg(name="")] = field(default_factory=Transform)
    max_images: int | None = None
    """Convert only this many, the first in the source's order (image files: by name)."""
    overwrite: bool = False
    """Replace `--dest` if it exists."""


def prepare(config: PrepareConfig) -> None:
    """Write the data set and print a line about it. Raises a `GddFastError`, with nothing written, if it cannot."""
    if config.dest.exists() and not config.overwrite:
        raise ConfigError(f"{config.dest} exists; --overwrite replaces it")
    check_destination(config.dest)
    source = open_source(config.source, config.split, config.labels)
    with tqdm(desc=source.kind, unit="img", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options = {"max_images": config.max_images, "progress": progress, "new": not config.overwrite}
        count, channels, height, width = convert(source, config.dest, config.transform, **options)
    classes = "no labels" if source.labels is None else _classes(source.labels[:count])
    print(f"{count} images {width}x{height}, {'gray' if channels == 1 else 'RGB'}, {classes} -> {config.dest}")
    if source.left_out:
        others = ", ".join(f"{number} {suffix}" for suffix, number in sorted(source.left_out.items()))
        print(f"left out, not recognised as images: {others}")


def _classes(labels: np.ndarray) -> str:
    """How many classes a network will have: one per number up to the largest label, with or without images."""
    number, used = int(labels.max()) + 1, len(np.unique(labels))
    return f"{number} classes" + ("" if used == number else f" ({used} of them with images)")


@command
def main(args: Sequence[str] | None = None) -> None:
    prepare(tyro.cli(PrepareConfig, args=args, prog="python -m gdd_fast.prepare"))


if __name__ == "__main__":
    main()
