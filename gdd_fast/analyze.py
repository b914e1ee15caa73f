"""What each layer of a diffusion network does at each noise level: `python -m gdd_fast.analyze --teacher PATH`.

For every residual branch: how large its output is, and how the denoised image changes without it, at the noise levels
that EDM's sampler passes through. With --student, the same for a generator distilled from it, at its only noise level.
Writes the numbers (.json) and a map of layers against noise levels (.svg); `gdd_fast.report` shows the
layer_analysis.json of a run folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gdd_fast.cli import command, parse, start
from gdd_fast.errors import require


@dataclass(frozen=True)
class AnalyzeConfig:
    """What `analyze` measures."""

    teacher: str
    """The diffusion network: EDM .pkl or network folder; `demo` is the bundled teacher."""
    student: Path | None = None
    """A one-step generator distilled from it: a training run folder, network folder or .pkl."""
    out: Path | None = None
    """The .json to write, with the .svg beside it. Default: layer_analysis.json in --student's folder, or here."""
    levels: int = 18
    """How many noise levels to analyse the teacher at: the steps of EDM's sampler."""
    images: int = 16
    """How many images each figure is the mean of, from seed 0 on."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""

    @property
    def destination(self) -> Path:
        from gdd_fast.report.run_record import LAYER_ANALYSIS

        beside = self.student if self.student is not None and self.student.is_dir() else Path()
        return self.out or beside / LAYER_ANALYSIS

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work. Reads no network."""
        from gdd_fast.files import check_destination

        require(self.levels >= 2, f"--levels must be at least 2, not {self.levels}")
        require(self.images >= 1, f"--images must be at least 1, not {self.images}")
        require(self.destination.suffix == ".json", f"--out must be a .json file, not {self.destination}")
        check_destination(self.destination)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(AnalyzeConfig, name="analyze", args=arguments, description=__doc__)
    config.validate()
    with start(__name__):  # imported late: --help needs no torch
        from tqdm import tqdm

        from gdd_fast.device import full_float32, pick_device
        from gdd_fast.files import atomic_write
        from gdd_fast.interop.hub import network_path
        from gdd_fast.models.files.load import load_generator
        from gdd_fast.report import layer_analysis, layer_map

    device = pick_device(config.device)
    teacher = load_generator(network_path(config.teacher), device, "float32")
    student = None if config.student is None else load_generator(config.student, device, "float32")
    work = config.levels + (student is not None)
    with full_float32(), tqdm(total=work, desc="Noise levels", unit="level", dynamic_ncols=True) as bar:
        found = layer_analysis.analyze(
            teacher, student, levels=config.levels, seeds=range(config.images), progress=bar.update
        )
    outputs = {
        config.destination: json.dumps(found) + "\n",
        config.destination.with_suffix(".svg"): layer_map.picture(found),
    }
    for path, text in outputs.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    print("\n".join(f"wrote {path}" for path in outputs))


if __name__ == "__main__":
    main()
