"""Export a one-step generator for use without gdd_fast: an ONNX file, a torch.export program, or a web page.

`python -m gdd_fast.export --net PATH --out generator.onnx`
`python -m gdd_fast.export --net PATH --web DIR`
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gdd_fast.cli import command, parse, start

with start(__name__):
    from gdd_fast.engine.portable import Precision, check_portable, write_portable
    from gdd_fast.errors import ConfigError
    from gdd_fast.files import check_destination
    from gdd_fast.interop.hub import network_path
    from gdd_fast.models.files.load import load_generator
    from gdd_fast.webpage.static_site import Page, check_site, write_site


@dataclass(frozen=True)
class ExportConfig:
    """What `export` writes."""

    net: str
    """EDM .pkl, network folder, training run folder (its EMA generator), diffusers pipeline, or the name of a Hub
    repository that holds one; `demo` is the bundled teacher."""
    out: Path | None = None
    """A file, replaced if it exists: .onnx for ONNX runtimes, .pt2 for torch.export.load."""
    web: Path | None = None
    """A new folder: a static page that runs the generator in the visitor's browser."""
    dtype: Precision = "float32"
    """What the file stores and computes in. float16 halves its size and changes pixels by a few of 255 levels."""
    sigma: float | None = None
    """Noise level of the one evaluation; by default the network's own."""
    images: int = 64
    """How many images to compare between the file and the network."""
    page: Page = field(default_factory=Page)
    """The web page."""

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work, before the network is read."""
        if self.out is None and self.web is None:
            raise ConfigError("nothing to write: pass --out generator.onnx, --out generator.pt2, or --web DIR")
        if self.out is not None:
            check_portable(self.out, self.dtype)
            check_destination(self.out)
        if self.web is not None:
            check_portable(self.web / "generator.onnx", self.dtype)
            check_site(self.web, self.page)
        if self.sigma is not None and not 0 < self.sigma < float("inf"):
            raise ConfigError(f"--sigma must be a positive number, not {self.sigma}")
        if self.images < 1:
            raise ConfigError(f"--images must be at least 1, not {self.images}")


def export(config: ExportConfig) -> None:
    """Write the files that `config` asks for and print how far their images are from the network's.

    Raises a `GddFastError` before anything is written if an option, the network or a missing library does not allow it,
    and WeightsError, with no such file left, if a file's images are not the network's.
    """
    config.validate()
    net = load_generator(network_path(config.net))
    options = {"dtype": config.dtype, "sigma": config.sigma, "images": config.images}
    if config.out is not None:
        difference = write_portable(net, config.out, **options)
        print(f"{config.out} ({_megabytes(config.out)}): {difference}")
    if config.web is not None:
        difference = write_site(net, config.web, config.page, **options)
        print(f"{config.web}/generator.onnx ({_megabytes(config.web / 'generator.onnx')}): {difference}")
        print(f"To look at it: python -m http.server --bind 127.0.0.1 --directory {config.web}")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


@command
def main(args: Sequence[str] | None = None) -> None:
    export(parse(ExportConfig, name="export", args=args, description=__doc__))


if __name__ == "__main__":
    main()
