"""Which curves a report draws: the columns of every run, and charts that name them."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from gdd_fast.metrics.names import TEACHER, deviation_key, higher_is_better
from gdd_fast.report.run_record import RunRecord

AXES = ("images", "minutes")
WARNINGS = {
    "discriminator_collapsed": "discriminator collapsed",
    "discriminator_saturated": "discriminator tells all apart",
    "loss_ran_away": "a loss ran away",
}
# title, subtitle, and the columns that share its axis; those that no run has are left out.
TRAINING: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Losses", "", {"loss_g": "generator", "loss_d": "discriminator", "loss": "loss"}),
    (
        "Logits and their gap",
        "means; the gap is real minus generated",
        {"logit_real": "real", "logit_fake": "generated", "logit_gap": "gap"},
    ),
    (
        "Discriminator's sign accuracy",
        "share of logits on the right side of zero",
        {"sign_accuracy_real": "real", "sign_accuracy_fake": "generated"},
    ),
    (
        "Gradient norms",
        "mean of the steps between two ticks",
        {"grad_norm_g": "generator", "grad_norm_d": "discriminator", "grad_norm": "all weights"},
    ),
    ("R1 penalty", "squared gradient norm at real images", {"r1_penalty": "R1 penalty"}),
    ("Gradient norm of R1 steps", "mean of the steps between two ticks", {"grad_norm_r1": "discriminator"}),
    ("Warnings", "1 where there is one", WARNINGS),
)
MACHINE: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Images per second", "sheets and metrics of the tick included", {"images_per_second": "images/s"}),
    ("Memory", "peak, GiB", {"peak_gpu_gib": "GPU", "peak_host_gib": "host"}),
    (
        "Skipped steps",
        "so far, for gradients that were not finite",
        {"skipped_g": "generator", "skipped_d": "discriminator", "skipped_r1": "R1", "skipped_steps": "steps"},
    ),
)


def columns(run: RunRecord) -> dict[str, list[float | None]]:
    """Every number of metrics.jsonl as a column, one entry per line; None where a line has none.

    A value of the teacher, measured once, is repeated in every line, as a level to compare the curve with.
    """
    keys = dict.fromkeys(key for line in run.lines for key, value in line.items() if _is_number(value))
    found = {key: [v if _is_number(v := line.get(key)) else None for line in run.lines] for key in keys}
    for key in found:
        if key.startswith(TEACHER):
            found[key] = [last(found, key)] * len(run.lines)
    if "logit_real" in found and "logit_fake" in found:
        pairs = zip(found["logit_real"], found["logit_fake"], strict=True)
        found["logit_gap"] = [None if real is None or fake is None else real - fake for real, fake in pairs]
    return found


def metric_names(runs: Sequence[RunRecord]) -> list[str]:
    """The columns that measure the generator: all except those of training and of the machine.

    Left out, too, are deviations and the teacher's values, which are shown with them.
    """
    known = {key for _, _, keys in (*TRAINING, *MACHINE) for key in keys} | set(AXES)
    names = dict.fromkeys(key for run in runs for key in columns(run) if key not in known)
    beside = {deviation_key(name) for name in names} | {TEACHER + name for name in names}
    beside |= {TEACHER + name for name in beside}
    return [name for name in names if name not in beside]


def charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Charts in the order of the page: `section`, `title`, `about`, `columns` (name -> label). JSON types."""
    present = {key for run in runs for key, values in columns(run).items() if any(v is not None for v in values)}
    found = []
    for name in metric_names(runs):
        better = "higher is better" if higher_is_better(name) else "lower is better"
        shown = {name: name} | ({TEACHER + name: "teacher"} if TEACHER + name in present else {})
        found.append({"section": "quality", "title": name, "about": better, "columns": shown})
    for section, groups in (("training", TRAINING), ("machine", MACHINE)):
        for title, about, keys in groups:
            kept = {key: label for key, label in keys.items() if key in present}
            if kept:
                found.append({"section": section, "title": title, "about": about, "columns": kept})
    return [chart for chart in found if present & set(chart["columns"])]


def summary(run: RunRecord) -> dict[str, tuple[str, float | None]]:
    """The rows of the table of runs: the text shown, and the number, if any, by which runs compare (lowest is best)."""
    data = columns(run)
    rows: dict[str, tuple[str, float | None]] = {"state": (state(run), None)}
    rows["images seen"] = (f"{run.images:,} of {run.total_images:,}", None)
    if minutes := last(data, "minutes"):
        rows["time"] = (duration(minutes), None)
    if speeds := [v for v in data.get("images_per_second", []) if v]:
        rows["images/s, median"] = (number(median(speeds)), -median(speeds))
    for key, title in (("peak_gpu_gib", "GPU memory, peak"), ("peak_host_gib", "host memory, peak")):
        if peaks := [v for v in data.get(key, []) if v]:
            rows[title] = (f"{max(peaks):.2f} GiB", max(peaks))
    if run.unet:
        trained, total = run.unet["trained"], run.unet["total"]
        rows["weights trained"] = (f"{trained:,} of {total:,} ({100 * trained / total:.1f} %)", None)
    skipped = [
        v for key in ("skipped_g", "skipped_d", "skipped_r1", "skipped_steps") if (v := last(data, key)) is not None
    ]
    if skipped:
        rows["steps skipped"] = (f"{sum(skipped):.0f}", sum(skipped))
    for name in metric_names([run]):
        place = _best(data[name], higher_is_better(name))
        if place is not None:
            value, deviations = data[name][place], data.get(deviation_key(name))
            spread = f" ± {deviations[place]:.2g}" if deviations else ""
            shown = f"{number(value)}{spread} at {run.lines[place]['images']:,}"
            rows[f"{name}, best"] = (shown, -value if higher_is_better(name) else value)
            rows[f"{name}, last"] = (number(last(data, name)), None)
            if TEACHER + name in data:
                rows[f"{name}, teacher"] = (number(last(data, TEACHER + name)), None)
    for row, values in (run.distances or {}).get("distances", {}).items():
        for feature, value in values.items():
            if _is_number(value):
                rows[f"Frechet distance {feature}, {row}"] = (number(value), value if row == "distilled" else None)
    return rows


def state(run: RunRecord) -> str:
    if run.finished:
        return "finished"
    return f"at {100 * run.images / run.total_images:.0f} %" if run.total_images else "no length known"


def last(data: dict[str, list[float | None]], key: str) -> float | None:
    """The latest value of a column that is not None; None if there is none."""
    return next((value for value in reversed(data.get(key, [])) if value is not None), None)


def number(value: float | None) -> str:
    """`value` with four digits, for reading."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    if minutes < 120:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.1f} h"


def _best(values: list[float | None], highest: bool) -> int | None:
    """The index of a column's best value, None if it has no values."""
    places = [place for place, value in enumerate(values) if value is not None]
    return (max if highest else min)(places, key=values.__getitem__, default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
