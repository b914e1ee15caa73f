"""The README.md of a generator on the Hub: its teacher, its data, how good it is, and the licences of all three.

What a training run recorded is read from its folder (config.json, report.json). Known licences are those of the
package's own assets, of EDM's published networks, and of a teacher whose card is beside it or in huggingface_hub's
cache; the publisher states the others, by the Hub's identifiers (mit, apache-2.0, cc-by-nc-sa-4.0, ...). Anything
unknown is "not stated" on the card.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gdd_fast.config import DEMO
from gdd_fast.errors import ConfigError

DATA_OF_DEMO = "Fashion-MNIST at 16x16"
LICENSE_OF_DEMO = "mit"
LICENSE_OF_EDM = "cc-by-nc-sa-4.0"  # of the networks that https://github.com/NVlabs/edm publishes
_EDM = re.compile(r"edm-\w+-\d+x\d+-(un)?cond-(ve|vp|adm)")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_ROWS = {
    "distilled": "this generator, 1 step",
    "teacher": "the teacher, many steps",
    "untrained": "the teacher's weights, 1 step",
}


@dataclass(frozen=True)
class Origin:
    """Where a generator comes from.

    Args:
        license, teacher_license, data_license: the Hub's identifiers; None if not stated.
        distances: Frechet distance by row ("teacher", "untrained", "distilled") and feature network, as in a run's
        report.json.
        measured: how many images were compared, and with which real ones.
    """

    teacher: str | None = None
    data: str | None = None
    license: str | None = None
    teacher_license: str | None = None
    data_license: str | None = None
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: str = ""
    training: str = ""

    def licensed(self, **licenses: str | None) -> "Origin":
        """A copy with those licences that are not None. Raises ConfigError for one that is not a Hub identifier."""
        for name, value in licenses.items():
            if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", value):
                raise ConfigError(f"{name} must be an identifier of the Hub, such as apache-2.0, not {value!r:.100}")
        return replace(self, **{name: value for name, value in licenses.items() if value is not None})


def origin_of_run(folder: Path) -> Origin:
    """What a training run's folder says about its generator; an empty Origin for any other folder."""
    config = _json(folder / "config.json")
    if "generator" not in config or "data" not in config:
        return Origin()
    teacher, data = config["generator"].get("teacher"), config["data"].get("data")
    report = _json(folder / "report.json")
    settings = {k: config["generator"].get(k) for k in ("freeze", "sigma_init")}
    options = "".join(f", --{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not None)
    count = report.get("measured", {}).get("trained_images")
    return Origin(
        teacher=Path(teacher).name if Path(teacher).exists() else teacher,
        data=DATA_OF_DEMO if data == DEMO else Path(data).name,
        teacher_license=license_of_teacher(teacher),
        data_license=LICENSE_OF_DEMO if data == DEMO else None,
        distances=report.get("distances", {}),
        measured=f"{report['images']:,} images against {report['reference_images']:,} of {report['reference']}"
        if report
        else "",
        training=f"{count:,} images{options}" if count else "",
    )


def license_of_teacher(teacher: str) -> str | None:
    """The identifier of a teacher's licence, or None if unknown. Uses no network connection."""
    if teacher == DEMO:
        return LICENSE_OF_DEMO
    if _EDM.fullmatch(Path(teacher).stem):
        return LICENSE_OF_EDM
    card: Path | None = Path(teacher) / "README.md"
    if not Path(teacher).exists() and _REPOSITORY.fullmatch(teacher):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(teacher, "README.md")
        card = Path(cached) if isinstance(cached, str) else None
    if card is None or not card.is_file():
        return None
    found = re.match(r"---\n(?:.*\n)*?license:[ \t]*([\w.-]+)[ \t]*\n(?:.*\n)*?---", card.read_text("utf-8", "replace"))
    return found[1] if found else None


def model_card(title: str, form: str, loading: str, origin: Origin) -> str:
    """The whole README.md.

    Args:
        title: the repository's name.
        form: what the images are, such as "3 x 32 x 32 pixels in 10 classes".
        loading: Python lines that load the generator.
    """
    front: dict[str, Any] = {
        "library_name": "gdd_fast",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gdd_fast", "one-step-generation"],
    }
    if origin.license:
        front["license"] = origin.license
    if origin.teacher and _REPOSITORY.fullmatch(origin.teacher):
        front["base_model"] = origin.teacher
    own = origin.distances.get("distilled", {})
    if own:
        metrics = [{"type": "frechet-distance", "name": f"FD-{name}", "value": value} for name, value in own.items()]
        data = {"type": "image-folder", "name": origin.data or "not stated"}
        result = {"task": {"type": "unconditional-image-generation"}, "dataset": data, "metrics": metrics}
        front["model-index"] = [{"name": title, "results": [result]}]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {title}", ""]
    lines += [f"An image generator of {form}, in one evaluation of a network (gdd_fast)."]
    lines += ["", "```python", loading, "```", "", "| | | licence |", "|---|---|---|"]
    rows = [
        ("teacher", origin.teacher, origin.teacher_license),
        ("data", origin.data, origin.data_license),
        ("this generator", origin.training and f"distilled for {origin.training}", origin.license),
    ]
    lines += [f"| {name} | {_cell(what)} | {_cell(license_)} |" for name, what, license_ in rows]
    if own:
        lines += ["", f"Frechet distance of {origin.measured}, lower is better:", ""]
        lines += ["| | " + " | ".join(f"FD-{name}" for name in own) + " |", "|---|" + "---|" * len(own)]
        lines += [
            f"| {words} | " + " | ".join(f"{origin.distances[row][name]:.2f}" for name in own) + " |"
            for row, words in _ROWS.items()
            if row in origin.distances
        ]
    return "\n".join(lines) + "\n"


def _cell(value: str | None) -> str:
    return value.replace("|", r"\|").replace("\n", " ") if value else "not stated"


def _json(path: Path) -> dict[str, Any]:
    """A JSON file that a run wrote; {} if there is none."""
    config = json.loads(path.read_text()) if path.is_file() else {}
    return config if isinstance(config, dict) else {}
