"""Tables, curves and sheets of what a study has come to, from the files that it left."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.folders import Folders, read_json, write_json
from benchmarks.study.judging import FLOOR, TEACHER, UNTRAINED
from benchmarks.study.plans import Run
from gdd_fast.bundled import teacher_path
from gdd_fast.files import atomic_write
from gdd_fast.models.files.load import load_generator
from gdd_fast.sampling.generate import SamplerConfig, generate
from gdd_fast.sampling.grid import save_panel

SHEET_IMAGES = 24
_TITLES = {
    FLOOR: "floor: real training images",
    TEACHER: "teacher",
    UNTRAINED: "teacher's weights, one step, untrained",
}
_INTRODUCTION = """\
Made by `python -m benchmarks.study {name} --table docs/study` from the runs of that study; [what it is](../study.md).
FD: Frechet distance, KID: kernel distance, of {images:,} generated images to the held-out ones. Precision and recall by
the first judge. CPU min: of all threads, for training to this point. Sets: of generated images with other seeds, over
which the mean and the deviation are; every run is one training.
"""


def write(folders: Folders, out: Path) -> None:
    """`NAME.json`, `NAME.md` (the tables), `NAME-curves.png` and `NAME-sheet.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    name = folders.study.name
    results = collect(folders)
    write_json(out / f"{name}.json", results)
    pictures = []
    if any(row["trained"] for row in results["rows"]):
        draw_curves(folders, results, out / f"{name}-curves.png")
        pictures.append(("Distance against images and against minutes", f"{name}-curves.png"))
    if write_sheet(folders, out / f"{name}-sheet.png"):
        pictures.append(("Images from the same noise, teacher first", f"{name}-sheet.png"))
    with atomic_write(out / f"{name}.md") as temporary:
        temporary.write_text(
            as_markdown(folders, results) + "".join(f"![{text}]({file})\n\n" for text, file in pictures)
        )


def collect(folders: Folders) -> dict[str, Any]:
    """Every figure of the study: one row for each run, milestone and sampler, over its seed sets."""
    grouped: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for path in sorted((folders.root / "judged").glob("*/*.json")):
        trained, sampler = path.stem.split("-", 1)
        sampler, seed_set = sampler.rsplit("-", 1)
        found = {**read_json(path), "seed_set": int(seed_set)}
        grouped.setdefault((path.parent.name, int(trained), sampler), []).append(found)
    rows = [
        {"what": what, "trained": trained, "sampler": sampler, **_over_seeds(found)}
        for (what, trained, sampler), found in sorted(grouped.items())
    ]
    for row in rows:
        row["minutes"] = _cpu_minutes(folders, row["what"], row["trained"])
    failed = [run.name for run in folders.study.all_runs() if folders.failure(run).exists()]
    return {"study": folders.study.name, "title": folders.study.title, "rows": rows, "failed": failed}


def _over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seed sets, and the deviation between them where there are several."""
    result: dict[str, Any] = {"images": found[0]["images"], "seed_sets": len(found)}
    for kind in ("frechet", "kernel", "precision_recall"):
        values: dict[str, Any] = {}
        for judge in found[0][kind]:
            samples = [f[kind][judge] if kind == "frechet" else f[kind][judge][0] for f in found]
            values[judge] = {"mean": statistics.fmean(samples)}
            if kind == "precision_recall":
                values[judge] = {
                    "precision": statistics.fmean(samples),
                    "recall": statistics.fmean(f[kind][judge][1] for f in found),
                }
            elif len(samples) > 1:
                values[judge]["deviation"] = statistics.stdev(samples)
        result[kind] = values
    return result


def _cpu_minutes(folders: Folders, what: str, trained: int) -> float | None:
    """Minutes of one thread that training took up to so many images, starts of processes included."""
    path = folders.cost(folders.root / "runs" / what)
    if not trained or not path.exists():
        return None
    seconds = 0.0
    for line in path.read_text().splitlines():
        part = json.loads(line)
        seconds += part["cpu_s"]
        if part["images"] >= trained:
            break
    return round(seconds / 60, 2)


def as_markdown(folders: Folders, results: dict[str, Any]) -> str:
    """The tables: reference rows, then runs at each milestone, best first by the headline judge."""
    references = [row for row in results["rows"] if not row["trained"]]
    order = {FLOOR: 0, TEACHER: 1, UNTRAINED: 2}
    references.sort(key=lambda row: (order[row["what"]], _steps(row["sampler"])))
    parts = [f"# {results['title']}", "", _INTRODUCTION.format(name=folders.study.name, images=folders.study.images)]
    parts += ["Reference figures:", "", *_table(folders, references), ""]
    for milestone in sorted({row["trained"] for row in results["rows"]} - {0}):
        rows = [row for row in results["rows"] if row["trained"] == milestone]
        rows.sort(key=lambda row: _headline(row)["mean"])
        parts += [f"After {milestone:,} images:", "", *_table(folders, rows), ""]
    if results["failed"]:
        parts += [f"Failed: {', '.join(results['failed'])}.", ""]
    return "\n".join(parts)


def _table(folders: Folders, rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["(nothing judged yet)"]
    judges = list(rows[0]["frechet"])
    kernels = list(rows[0]["kernel"])[:1]
    heads = ["", *(f"FD {j}" for j in judges), *(f"KID {j} x1000" for j in kernels), "precision", "recall", "sets"]
    lines = ["| " + " | ".join([*heads, "CPU min"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [_title(folders, row), *(_number(row["frechet"][j]) for j in judges)]
        cells += [_number(row["kernel"][j], 1000) for j in kernels]
        shares = next(iter(row["precision_recall"].values()))
        cells += [f"{shares['precision']:.3f}", f"{shares['recall']:.3f}", str(row["seed_sets"])]
        cells.append("" if row["minutes"] is None else f"{row['minutes']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: dict[str, float], scale: float = 1) -> str:
    spread = f" ± {scale * value['deviation']:.2g}" if "deviation" in value else ""
    mean = scale * value["mean"]
    return (f"{mean:.3f}" if abs(mean) < 10 else f"{mean:.1f}") + spread


def _title(folders: Folders, row: dict[str, Any]) -> str:
    if row["what"] in _TITLES:
        steps = _steps(row["sampler"])
        return _TITLES[row["what"]] + (f", {steps} step{'s'[: steps > 1]}" if row["what"] == TEACHER else "")
    return _title_of(folders, row["what"])


def _title_of(folders: Folders, name: str) -> str:
    run = next((run for run in folders.study.all_runs() if run.name == name), None)
    return name if run is None else run.title + (f", seed {run.flags['seed']}" if "seed" in run.flags else "")


def _steps(sampler: str) -> int:
    return int(sampler.removeprefix("heun")) if sampler.startswith("heun") else 0


def _headline(row: dict[str, Any]) -> dict[str, float]:
    return next(iter(row["frechet"].values()))


def draw_curves(folders: Folders, results: dict[str, Any], path: Path) -> None:
    """The headline distance against images and against minutes of one thread; teacher and floor as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (by_images, by_minutes) = plt.subplots(1, 2, figsize=(14, 4.5), sharey=True, layout="constrained")
    runs = list(dict.fromkeys(row["what"] for row in results["rows"] if row["trained"]))
    styles = [{"color": f"C{i % 10}", "marker": "osD^"[i // 10 % 4], "ms": 4} for i in range(len(runs))]
    for name, style in zip(runs, styles, strict=True):
        rows = sorted((r for r in results["rows"] if r["what"] == name), key=lambda r: r["trained"])
        distances = [_headline(row)["mean"] for row in rows]
        by_images.plot([row["trained"] for row in rows], distances, label=_title_of(folders, name), **style)
        timed = [(row["minutes"], d) for row, d in zip(rows, distances, strict=True) if row["minutes"]]
        if timed:
            by_minutes.plot(*zip(*timed, strict=True), **style)
    for row in results["rows"]:
        if row["what"] in (FLOOR, TEACHER) and row["sampler"] in ("real", f"heun{folders.study.teacher_steps[0]}"):
            for axes in (by_images, by_minutes):
                axes.axhline(_headline(row)["mean"], color="gray", lw=1, ls=":" if row["what"] == FLOOR else "--")
                axes.text(0.99, _headline(row)["mean"], _title(folders, row), transform=axes.get_yaxis_transform(),
                          ha="right", va="bottom", fontsize=7)  # fmt: skip
    by_images.set(xscale="log", yscale="log", xlabel="images", ylabel=f"FD {next(iter(results['rows'][0]['frechet']))}")
    by_minutes.set(xscale="log", xlabel="processor minutes")
    figure.legend(loc="outside right center", fontsize=7)
    for axes in (by_images, by_minutes):
        axes.xaxis.set(
            major_locator=ticker.LogLocator(subs=(1, 2, 5)),
            major_formatter=ticker.StrMethodFormatter("{x:,.0f}"),
            minor_formatter=ticker.NullFormatter(),
        )
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(results["title"])
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def write_sheet(folders: Folders, path: Path) -> bool:
    """Images of the same seeds by the teacher and each run's last snapshot. Whether there are any."""
    rows = []
    if Path(teacher_path(folders.teacher)).exists():
        steps = folders.study.teacher_steps[0]
        heun = SamplerConfig(sampler="heun", steps=steps)
        rows.append((f"Teacher, {steps} steps", _samples(folders.teacher, heun)))
    for run in folders.study.runs:
        reached = folders.reached(run)
        if reached:
            rows.append((_sheet_title(run, reached[-1]), _samples(str(folders.snapshot(run, reached[-1])), None)))
    if rows:
        save_panel(rows, path, cols=SHEET_IMAGES, zoom=3)
    return bool(rows)


def _sheet_title(run: Run, milestone: int) -> str:
    return f"{run.title}, one step, {milestone:,} images"


def _samples(net: str, sampler: SamplerConfig | None) -> Tensor:
    network = load_generator(teacher_path(net), dtype="float32")
    parts: Iterable[Tensor] = (part.images for part in generate(network, range(SHEET_IMAGES), sampler))
    return torch.cat(list(parts)).permute(0, 3, 1, 2)
