"""`evaluate ref`: writes the statistics of a data set to a file that can replace its images."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gdd_fast.config import named_paths
from gdd_fast.data import load_data
from gdd_fast.device import full_float32
from gdd_fast.errors import require
from gdd_fast.files import check_destination
from gdd_fast.metrics.measure import Measurement, parse_metrics
from gdd_fast.metrics.population import Needs, dataset_populations
from gdd_fast.metrics.reference import save_reference
from gdd_fast.ranks import World, join
from gdd_fast.settings import Settings


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """What `evaluate ref` stores of a data set."""

    data: str
    """The real images: EDM-style zip, folder or npz."""
    out: Path
    """The .npz to write: mu and sigma in EDM's format, with the number of images, their size and the network's name."""
    features: str = "inception"
    """The feature network."""
    with_features: bool = False
    """Store the features of every image too, which kid, pr and dc need: 4 bytes per image and feature."""
    feature_resolution: int | None = None
    """Resolution at which features are computed; by default the network's own."""
    feature_weights: tuple[str, ...] = ()
    """Local weight file of the network, `name=path`."""
    data_images: int | None = None
    """How many images to use at most; by default all."""
    batch: int = 64
    """Images per pass through the network."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work. Reads no file."""
        require("," not in self.features, f"a reference holds the features of one network, not of {self.features}")
        require(self.out.suffix.lower() == ".npz", f"--out must be an .npz file, not {self.out}")
        require(not self.out.exists(), f"--out {self.out} exists; name another file or move it")
        check_destination(self.out)
        require(self.data_images is None or self.data_images >= 2, "--data-images must be at least 2")
        require(self.batch >= 1, f"--batch must be at least 1, not {self.batch}")
        named_paths("--feature-weights", self.feature_weights)


@full_float32()
def write_reference(config: ReferenceConfig) -> int:
    """Write the statistics that `config` asks for; the number of images. Raises a `GddFastError` for bad input."""
    config.validate()
    with join(config.device) as world:
        dataset = load_data(config.data)
        measurement = Measurement(
            parse_metrics(f"fd@{config.features}"),
            weights=named_paths("--feature-weights", config.feature_weights),
            resolution=config.feature_resolution,
            device=world.device,
        )
        needs = [Needs(statistics=True, rows=config.with_features)]
        total = min(len(dataset), config.data_images or len(dataset))
        with image_bar(total, "real", world) as bar:
            options = {"batch": config.batch, "max_images": config.data_images, "progress": bar.update, "world": world}
            found = dataset_populations(dataset, measurement.extractors, needs, **options)
        if world.is_main:
            save_reference(found[0], config.out, rows=config.with_features, new=True)
    return total


def image_bar(total: int, what: str, world: World, delay: float = 0) -> tqdm:
    """A progress bar over `total` images, on the main rank; shown if it takes longer than `delay` seconds."""
    return tqdm(total=total, desc=what, unit="img", delay=delay, dynamic_ncols=True, disable=not world.is_main)
