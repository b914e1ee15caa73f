"""The page: one HTML file that shows one or more runs. It fetches nothing, and forbids the browser to do so."""

import base64
import io
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from gdd_fast.data.decode import decode
from gdd_fast.errors import DataError, GddFastError
from gdd_fast.files import atomic_write
from gdd_fast.report import layer_map, run_charts, unet_picture
from gdd_fast.report.run_record import RunRecord, read_run

PAGE = "report.html"
MAX_SHEETS = 40
"""The most sheets shown of one run, spread evenly over its length, first and last included."""
LOSSLESS_BYTES = 60_000  # larger lossless sheets are compressed with loss


def write_page(folders: Sequence[Path], destination: Path) -> None:
    """Read the runs in `folders` and write their page, whole or not at all.

    Raises DataError for a folder that is not a run, or if a file in it is damaged.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    text = page(runs)
    with atomic_write(destination) as temporary:
        # a folder's name may be bytes that are not UTF-8; the page shows them as Python does
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def refresh(run_dir: Path) -> None:
    """Write the page of a running training into its folder. An error is only printed, as training can do without it."""
    try:
        write_page([run_dir], run_dir / PAGE)
    except (GddFastError, OSError) as error:
        print(f"{run_dir / PAGE} was not written: {error}", file=sys.stderr)


def is_there(run_dir: Path) -> bool:
    """Whether the run's page exists."""
    return (run_dir / PAGE).is_file()


def page(runs: Sequence[RunRecord]) -> str:
    """The whole page as HTML."""
    names = _names(runs)
    data = {
        "runs": [_data(run, name) for run, name in zip(runs, names, strict=True)],
        "charts": run_charts.charts(runs),
        "live": not all(run.finished for run in runs),
    }
    sections = [
        ("samples", "Samples", _samples(runs, names)),
        ("quality", "Quality", _charts("quality", data["charts"])),
        ("training", "Training", _charts("training", data["charts"])),
        ("machine", "Machine", _charts("machine", data["charts"])),
        ("runs", "Runs" if len(runs) > 1 else "The run", _table(runs, names)),
        ("unet", "What trains, and what is frozen", _unets(runs, names)),
        ("layers", "What the layers do", _layers(runs, names)),
        ("settings", "Settings", _settings(runs, names)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, title, html in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(", ".join(names))} - gdd_fast</title>
<style>{_asset("uPlot.min.css")}{_asset("page.css")}</style>
</head>
<body>
<header>{_header(runs, names)}</header>
<nav>{links}</nav>
<main>{body}</main>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>{_asset("uPlot.iife.min.js")}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("gdd_fast.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    """JSON escaped so that no text in it can end the script element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Names that tell the runs apart: folder names, or as much of the paths as needed."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _data(run: RunRecord, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "columns": run_charts.columns(run),
        "sheets": [{"images": images, "source": _picture(path)} for images, path in _chosen(run.sheets)],
    }


def _chosen(sheets: dict[int, Path]) -> list[tuple[int, Path]]:
    items = sorted(sheets.items())
    if len(items) <= MAX_SHEETS:
        return items
    return [items[round(k * (len(items) - 1) / (MAX_SHEETS - 1))] for k in range(MAX_SHEETS)]


def _picture(path: Path) -> str:
    """A picture as a data URI. Raises DataError if it cannot be read."""
    try:
        image = decode(path.read_bytes(), str(path)).convert("RGB")
    except (DataError, OSError) as error:
        raise DataError(f"{path} is not a picture that can be read ({error}); remove it") from None
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=2)
    if buffer.tell() > LOSSLESS_BYTES:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _header(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    title = escape(names[0]) if len(runs) == 1 else f"{len(runs)} runs"
    chips = "".join(
        f'<span class="chip" data-run="{k}"><i></i>{escape(name)}<b>{escape(run_charts.state(run))}</b></span>'
        for k, (run, name) in enumerate(zip(runs, names, strict=True))
    )
    tiles = _tiles(runs[0]) if len(runs) == 1 else ""
    live = '<label class="live"><input type="checkbox" id="live" checked> reload every minute</label>'
    live = "" if all(run.finished for run in runs) else live
    return (
        f'<div class="top"><div><p class="kind">gdd_fast report</p><h1>{title}</h1></div>'
        f'<p class="made">written {made}{live}</p></div><div class="chips">{chips}</div>{tiles}'
    )


def _tiles(run: RunRecord) -> str:
    """The figures that readers want first."""
    rows = run_charts.summary(run)
    wanted = {"images seen": "images seen", "time": "time", "images/s, median": "images/s"}
    wanted |= {"GPU memory, peak": "GPU memory", "host memory, peak": "host memory"}
    wanted |= {name: name for name in rows if name.endswith((", best", ", distilled"))}
    tiles = [(title, rows[name][0]) for name, title in wanted.items() if name in rows][:7]
    if run.unet:
        frozen = 100 - 100 * run.unet["trained"] / run.unet["total"]
        tiles.append(("weights frozen", f"{frozen:.1f} %"))
    cells = []
    for title, shown in tiles:
        mark = next((mark for mark in (" ± ", " at ", " of ") if mark in shown), " at ")
        value, mark, rest = shown.partition(mark)
        cells.append(f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(mark + rest)}</small></dd></div>")
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _samples(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Sheets from the same noise: the teacher, one step before training, and one step at the slider's position.

    Sheets that several runs start from are shown once, with the runs' own sheets beside them.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for k, (run, name) in enumerate(zip(runs, names, strict=True)):
        before = []
        if run.teacher_sheet:
            before.append(_figure(_image(run.teacher_sheet, "the teacher's samples"), "Teacher, many steps"))
        if 0 in run.sheets:
            before.append(_figure(_image(run.sheets[0], "samples of the untrained generator"), "One step, before"))
        if run.sheets:
            image = f'<img class="sheet" data-run="{k}" alt="samples of the generator">'
            title = f'<span data-run="{k}"><i></i>{escape(name)}</span>: one step' if len(runs) > 1 else "One step"
            caption = f'{title}, after <output data-run="{k}"></output> images'
            groups.setdefault(tuple(before), []).append(_figure(image, caption, "after"))
        elif run.comparison:
            image = _image(run.comparison, "teacher, untrained and distilled generator")
            groups.setdefault((*before, _figure(image, escape(name), "after")), [])
    if not groups:
        return ""
    control = (
        '<div class="control"><button id="play" type="button" aria-label="Play">▶</button>'
        '<input id="slider" type="range" min="0" value="0" step="1" aria-label="Images seen">'
        '<output id="at"></output></div>'
    )
    about = "All sheets are from the same noise. Move the slider to see the generator learn."
    rows = "".join(f'<div class="sheets">{"".join([*before, *after])}</div>' for before, after in groups.items())
    return f'<p class="about">{about}</p>' + (control if any(run.sheets for run in runs) else "") + rows


def _figure(image: str, caption: str, kind: str = "before") -> str:
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _image(path: Path, alternative: str) -> str:
    return f'<img class="sheet" src="{_picture(path)}" alt="{escape(alternative)}">'


def _charts(section: str, charts: Sequence[dict[str, Any]]) -> str:
    """Places for the charts of a section; the script draws into them."""
    places = "".join(
        f'<article class="chart" data-chart="{k}"><h3>{escape(chart["title"])}'
        f'<button type="button" class="log" aria-pressed="false">log</button></h3>'
        f'<p class="about">{escape(chart["about"]) or "&nbsp;"}</p><div class="plot"></div></article>'
        for k, chart in enumerate(charts)
        if chart["section"] == section
    )
    if not places:
        return ""
    choice = "".join(f'<button type="button" data-axis="{axis}">{axis}</button>' for axis in run_charts.AXES)
    axis = f'<div class="axis" role="group" aria-label="Horizontal axis">against {choice}</div>'
    return f'{axis}<div class="charts">{places}</div>'


def _table(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    changes = "".join(
        f"<p class=about>{escape(name)}, from {images:,} images on: {escape('; '.join(texts))}</p>"
        for run, name in zip(runs, names, strict=True)
        for images, texts in run.changes
    )
    found = [run_charts.summary(run) for run in runs]
    if len(runs) == 1:
        pairs = "".join(
            f"<div><dt>{escape(k)}</dt><dd>{escape(shown)}</dd></div>" for k, (shown, _) in found[0].items()
        )
        return f'<dl class="pairs">{pairs}</dl>{changes}'
    rows = []
    for row in dict.fromkeys(key for summary in found for key in summary):
        scores = [summary.get(row, ("", None))[1] for summary in found]
        known = [score for score in scores if score is not None]
        best = min(known) if len(known) > 1 and len(set(known)) > 1 else None
        marks = [" class=best" if best is not None and score == best else "" for score in scores]
        shown = [escape(summary.get(row, ("-", None))[0]) for summary in found]
        cells = "".join(f"<td{mark}>{text}</td>" for mark, text in zip(marks, shown, strict=True))
        rows.append(f"<tr><th>{escape(row)}</th>{cells}</tr>")
    return _tabular(names, {"": rows}) + changes


def _tabular(names: Sequence[str], groups: dict[str, list[str]]) -> str:
    """Table rows under their titles: one table with a column per run, or short tables side by side for one run."""
    titled = {title: _part(title, len(names)) + "".join(rows) for title, rows in groups.items()}
    if len(names) == 1:
        tables = "".join(
            f"<table{' class=whole' if title else ''}><tbody>{rows}</tbody></table>" for title, rows in titled.items()
        )
        return f'<div class="columns">{tables}</div>'
    heads = "".join(f'<th data-run="{k}"><i></i>{escape(name)}</th>' for k, name in enumerate(names))
    body = "".join(titled.values())
    return f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _part(title: str, runs: int) -> str:
    return f'<tr class="part"><th colspan="{runs + 1}">{escape(title)}</th></tr>' if title else ""


def _unets(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """One picture for all runs in which the same layers train."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.unet:
            groups.setdefault(json.dumps(run.unet), (run.unet, []))[1].append(name)
    shown = []
    for unet, members in groups.values():
        title = f"<h3>{escape(', '.join(members))}</h3>" if len(runs) > 1 else ""
        frozen = 1 - unet["trained"] / unet["total"]
        bar = (
            f'<div class="share"><div class="frozen" style="width:{100 * frozen:.2f}%"></div>'
            f'<div class="trained" style="width:{100 - 100 * frozen:.2f}%"></div></div>'
            f'<p class="about"><i class="key frozen"></i>frozen {100 * frozen:.1f} % '
            f'<i class="key trained"></i>trained {100 - 100 * frozen:.1f} % of {unet["total"]:,} weights</p>'
        )
        shown.append(f'{title}{bar}<div class="wide">{unet_picture.picture(unet)}</div>')
    return "".join(shown)


def _layers(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    shown = []
    for run, name in zip(runs, names, strict=True):
        if run.layers:
            title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
            maps = "".join(f"<div>{svg}</div>" for svg in layer_map.pictures(run.layers))
            shown.append(f'{title}<div class="maps">{maps}</div>')
    about = (
        "Each row is a residual branch of the U-Net, each column a noise level of the sampler. GDD-I rests on what "
        "they show: layers are differentially activated at different noise levels, so a network holds more than any "
        "one level uses."
    )
    return f'<p class="about">{about}</p>' + "".join(shown) if shown else ""


def _settings(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    found = [run.settings for run in runs]
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for settings in found for key in settings):
        section, _, option = key.rpartition(".")
        values = [_shown(settings.get(key)) for settings in found]
        kind = "differs" if len(set(values)) > 1 else "same"
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        groups.setdefault(section, []).append(f'<tr class="{kind}"><th>{escape(option)}</th>{cells}</tr>')
    only = '<label class="only"><input type="checkbox" id="only"> only what differs</label>' if len(runs) > 1 else ""
    return only + _tabular(names, groups)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
