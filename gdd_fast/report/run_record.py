"""What a run folder holds: settings, the metrics of every tick, sheets of samples, and final measurements."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdd_fast.errors import DataError
from gdd_fast.files import parse_json
from gdd_fast.report import forms

SAMPLES = "samples"
TEACHER_SHEET = "teacher.png"
"""In the folder of samples: the teacher's images, from the same noise as all other sheets there."""
COMPARISON = "comparison.png"
UNET = "unet.json"
LAYER_ANALYSIS = "layer_analysis.json"


@dataclass(frozen=True)
class RunRecord:
    """One run, up to its latest tick.

    Args:
        folder: the run's.
        config: all settings, as from `config.to_dict`.
        lines: those of metrics.jsonl, in the order of their images; values that are not finite are None.
        changes: (images, settings that changed there), for runs resumed with other settings.
        sheets: images seen -> sheet of samples.
        teacher_sheet, comparison: pictures, None if there are none.
        unet: from `unet_picture.record`, None if the run has not written it.
        layers: from `layer_analysis.analyze`, None if `gdd_fast.analyze` was not run.
        distances: from `distill.comparison`, at the end of a run.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    changes: list[tuple[int, list[str]]]
    sheets: dict[int, Path]
    teacher_sheet: Path | None
    comparison: Path | None
    unet: dict[str, Any] | None
    layers: dict[str, Any] | None
    distances: dict[str, Any] | None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by `section.name`, those outside a section by their name."""
        flat = {}
        for key, value in self.config.items():
            flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return flat

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its name, whatever its section."""
        return next((v for k, v in self.settings.items() if k.rpartition(".")[2] == name), default)

    @property
    def images(self) -> int:
        """Real images seen at the last tick."""
        return self.lines[-1]["images"] if self.lines else 0

    @property
    def total_images(self) -> int:
        return round(float(self.setting("duration_mimg", 0)) * 1e6)

    @property
    def finished(self) -> bool:
        return 0 < self.total_images <= self.images


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises DataError if it is not one, or if a file in it is damaged."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not a training run: it has no config.json; give the folder of --run-dir")
    config = _json(folder / "config.json", forms.CONFIG)
    if "format" in config:
        raise DataError(f"{folder} is a network, not a training run; give the folder of --run-dir")
    entries = _lines(folder / "metrics.jsonl")
    sheets = {int(path.stem): path for path in sorted((folder / SAMPLES).glob("*.png")) if path.stem.isdigit()}
    record = RunRecord(
        folder=folder,
        config=config,
        lines=sorted((e for e in entries if "changed" not in e), key=lambda line: line["images"]),
        changes=[(e["images"], e["changed"]) for e in entries if "changed" in e],
        sheets=sheets,
        teacher_sheet=_if_there(folder / SAMPLES / TEACHER_SHEET),
        comparison=_if_there(folder / COMPARISON),
        unet=_if_there(folder / UNET, _unet),
        layers=_if_there(folder / LAYER_ANALYSIS, _layers),
        distances=_if_there(folder / "report.json", lambda path: _json(path, forms.DISTANCES)),
    )
    length = record.setting("duration_mimg", 0)
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise DataError(f"{folder / 'config.json'}: duration_mimg is {length!r}, not a number; correct it")
    return record


def _if_there(path: Path, read: Callable[[Path], Any] = lambda path: path) -> Any:
    return read(path) if path.is_file() else None


def _json(path: Path, form: Any) -> dict[str, Any]:
    """The JSON object in `path`, which must have this form."""
    try:
        value = parse_json(path.read_bytes())
        forms.check(value, form)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); move it away or make it again") from None
    return value


def _unet(path: Path) -> dict[str, Any]:
    unet = _json(path, forms.UNET)
    if not 0 <= unet["trained"] <= unet["total"] or not unet["total"]:
        raise DataError(f"{path}: {unet['trained']} of {unet['total']} weights; move it away or make it again")
    return unet


def _layers(path: Path) -> dict[str, Any]:
    layers = _json(path, forms.LAYERS)
    for who in ("teacher", "student"):
        network = layers.get(who)
        for measure in ("output_change", "relative_norm") if network else ():
            rows = [len(row) for row in network[measure]]
            if rows != [len(network["sigmas"])] * len(layers["layers"]) or not rows or not rows[0]:
                raise DataError(f"{path}: {who}.{measure} lacks one value per layer and level; make it again")
    return layers


def _lines(path: Path) -> list[dict[str, Any]]:
    """Entries of metrics.jsonl. An incomplete last line is still being written, and left out."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = parse_json(line)
            forms.check(entry, forms.ENTRY)
            forms.check(entry, forms.CHANGE if "changed" in entry else forms.LINE)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not a line of metrics ({error}); remove it") from None
        found.append(entry)
    return found
