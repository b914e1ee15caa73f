"""What a run folder says: settings, the metrics of every tick, sheets of samples, and what was measured of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdd_fast.errors import DataError

SAMPLES = "samples"
TEACHER_SHEET = "teacher.png"
"""In the folder of samples: the teacher's images from the noise of every other sheet there."""
UNET = "unet.json"
LAYER_ANALYSIS = "layer_analysis.json"


@dataclass(frozen=True)
class RunRecord:
    """One run, as far as it has come.

    Args:
        folder: of the run.
        config: all settings, as `config.to_dict` made them.
        lines: of metrics.jsonl, in the order of their images; what is not finite is None.
        changes: (images, settings that changed there), where a resumed run went on with other ones.
        sheets: images seen -> sheet of samples.
        teacher_sheet, comparison: pictures, None where there are none.
        unet: of `unet_picture.record`, None where the run has not written it.
        layers: of `layer_analysis.analyze`, None where nobody has asked for it.
        distances: of `distill.comparison`, at the end of a run.
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
        """A setting by the name of its flag, in whatever section it stands."""
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
    """Read a run folder. Raises DataError if it is none, or a file in it is damaged."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not a training run: it has no config.json; give the folder of --run-dir")
    config = _json(folder / "config.json")
    if "format" in config:
        raise DataError(f"{folder} is a network, not a training run; give the folder of --run-dir")
    entries = _lines(folder / "metrics.jsonl")
    sheets = {int(path.stem): path for path in sorted((folder / SAMPLES).glob("*.png")) if path.stem.isdigit()}
    return RunRecord(
        folder=folder,
        config=config,
        lines=sorted((e for e in entries if "changed" not in e), key=lambda line: line["images"]),
        changes=[(e["images"], e["changed"]) for e in entries if "changed" in e],
        sheets=sheets,
        teacher_sheet=_if_there(folder / SAMPLES / TEACHER_SHEET),
        comparison=_if_there(folder / "comparison.png"),
        unet=_if_there(folder / UNET, _json),
        layers=_if_there(folder / LAYER_ANALYSIS, _json),
        distances=_if_there(folder / "report.json", _json),
    )


def _if_there(path: Path, read: Callable[[Path], Any] = lambda path: path) -> Any:
    return read(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); move it away or make it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; move it away or make it again")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Entries of metrics.jsonl; one that is cut short at the end is being written, and left out."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            entry = json.loads(line)
            entry["images"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a line of metrics ({error}); remove it") from None
        found.append(entry)
    return found
