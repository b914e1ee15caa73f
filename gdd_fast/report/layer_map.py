"""The picture "layers x noise levels" of a layer analysis, as SVG."""

from collections.abc import Sequence
from html import escape
from typing import Any

VIEWS: dict[str, tuple[str, str, str, bool]] = {
    "change": (
        "output_change",
        "Change of the denoised image without the branch",
        "relative to the network's own share of that image",
        False,
    ),
    "when": ("output_change", "When each branch counts", "that change, relative to the branch's largest", True),
    "norm": ("relative_norm", "Norm of the branch's output", "relative to the sum that it is added into", False),
}
"""For each map: the measure, the title, what the colour is relative to, and whether each row has its own scale."""
ROW, COLUMN, LABEL, TOP, STUDENT_GAP = 15, 20, 160, 34, 10
# Anchors of a colour map from dark to light that works in greyscale and for colour-blind readers (viridis, CC0).
COLOURS = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142))
COLOURS += ((31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37))
STYLE = (
    "<style>.layer-map{font:11px system-ui,sans-serif;fill:var(--ink,#1d2330)}.layer-map .title{font-size:13px;"
    "font-weight:600}.layer-map .quiet{fill:var(--quiet,#667085)}@media(prefers-color-scheme:dark){.layer-map{"
    "fill:var(--ink,#e7eaf0)}.layer-map .quiet{fill:var(--quiet,#98a2b3)}}</style>"
)


def pictures(analysis: dict[str, Any]) -> list[str]:
    """One map for each of `VIEWS`, as SVG elements; `analysis` is what `layer_analysis.analyze` returned."""
    return [_element(*_map(analysis, view)) for view in VIEWS]


def picture(analysis: dict[str, Any]) -> str:
    """The same, one below the other, as one SVG file."""
    parts, top, width = [], 0.0, 0.0
    for view in VIEWS:
        body, right, height = _map(analysis, view)
        parts.append(f'<g transform="translate(0 {top:g})">{body}</g>')
        top, width = top + height + 24, max(width, right)
    return _element("".join(parts), width, top - 24) + "\n"


def _element(body: str, width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="layer-map" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" role="img" aria-label="Layers against noise levels">{STYLE}{body}</svg>'
    )


def _map(analysis: dict[str, Any], view: str) -> tuple[str, float, float]:
    """One map, and its width and height in pixels."""
    measure, title, detail, by_row = VIEWS[view]
    parts = {who: analysis[who] for who in ("student", "teacher") if who in analysis}
    table = [{who: part[measure][row] for who, part in parts.items()} for row in range(len(analysis["layers"]))]
    if by_row:
        table = [_scaled(row) for row in table]
    teacher, student = parts["teacher"], parts.get("student")
    rows, sigmas = analysis["layers"], teacher["sigmas"]
    top = 1.0 if by_row else _ceiling([value for row in table for values in row.values() for value in values])
    first = LABEL + (COLUMN + STUDENT_GAP if student else 0)
    right = first + COLUMN * len(sigmas)
    bottom = TOP + ROW * len(rows)
    svg = [f'<text class="title" x="0" y="13">{escape(title)}</text>']
    svg.append(f'<text class="quiet" x="0" y="28">{escape(detail)}, mean over {analysis["images"]} images</text>')
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        name = f"{row['name']} {row['kind']}"
        svg.append(f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        cells = [(first + COLUMN * k, sigma, table[number]["teacher"][k], "") for k, sigma in enumerate(sigmas)]
        if student:
            cells.insert(0, (LABEL, student["sigmas"][0], table[number]["student"][0], "student, "))
        for x, sigma, value, who in cells:
            svg.append(
                f'<rect x="{x}" y="{y}" width="{COLUMN - 1}" height="{ROW - 1}" fill="{_colour(value / top)}">'
                f"<title>{escape(name)}, {who}σ {sigma:.3g}: {value:.3g}</title></rect>"
            )
    for k, sigma in enumerate(sigmas):
        x = first + COLUMN * (k + 0.5)
        svg.append(f'<text x="{x:g}" y="{bottom + 13}" text-anchor="middle" font-size="8">{_short(sigma)}</text>')
    axis = "teacher: noise level σ, from the sampler's first step to its last"
    svg.append(f'<text class="quiet" x="{first}" y="{bottom + 29}">{axis}</text>')
    if student:
        svg.append(f'<text x="{LABEL + COLUMN / 2}" y="{bottom + 13}" text-anchor="middle" font-size="8">80</text>')
        svg.append(f'<text class="quiet" x="{LABEL + COLUMN}" y="{bottom + 29}" text-anchor="end">student</text>')
    svg.append(_legend(LABEL if student is None else first, bottom + 40, top))
    return "".join(svg), max(right, LABEL + 320), bottom + 56


def _legend(x: float, y: float, top: float) -> str:
    steps = 24
    strip = "".join(
        f'<rect x="{x + 26 + 6 * k:g}" y="{y:g}" width="6.5" height="10" fill="{_colour(k / (steps - 1))}"/>'
        for k in range(steps)
    )
    end = x + 26 + 6 * steps + 6
    numbers = (
        f'<text x="{x + 20}" y="{y + 9:g}" text-anchor="end">0</text><text x="{end:g}" y="{y + 9:g}">{top:.2g}</text>'
    )
    return numbers + strip


def _scaled(row: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each network's values relative to the largest in the row."""
    largest = max(value for values in row.values() for value in values) or 1.0
    return {who: [value / largest for value in values] for who, values in row.items()}


def _ceiling(values: Sequence[float]) -> float:
    """The value of the lightest colour: the 98th percentile of the cells, so that one outlier does not darken the
    rest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))] or 1.0


def _colour(share: float) -> str:
    position = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(position), len(COLOURS) - 2)
    mixed = (a + (b - a) * (position - low) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _short(sigma: float) -> str:
    if sigma >= 1:
        return f"{sigma:.0f}" if sigma >= 10 else f"{sigma:.1f}"
    return f"{sigma:.2g}".removeprefix("0") if sigma >= 0.1 else f"{sigma:.1g}".removeprefix("0")
