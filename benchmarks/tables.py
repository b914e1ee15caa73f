"""`python -m benchmarks.tables`: the tables of docs/benchmarks.md and README.md, from benchmarks/results/*.json.

What stands between `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->` is replaced: in the README one short table
a device, in the docs every row. `--check` changes nothing and exits with 1 if a file does not agree with the results.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import FOLDER, Results, Row, format_seconds

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADLINES = ("generator", "iteration", "G step", "D step", "R1 step", "sampling to disk", "adam and average")
"""Groups that the README shows."""
_NO_RECORD = "No figure has been recorded yet."
_NO_GPU = "No GPU has been measured yet: every figure here is of a CPU."


def load_all(folder: Path = FOLDER) -> list[Results]:
    """Every record there is, GPUs first, then by name."""
    found = [Results.load(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(("tuning", "."))]
    return sorted(found, key=lambda r: (r.machine["type"] != "cuda", r.machine["device"]))


def readme(records: Sequence[Results]) -> str:
    """The short tables: one line a case, its peers side by side, and how many times faster ours is than `stock`."""
    parts = _preface(records)
    for record in records:
        cases = [case for case in _cases(record) if case[0].group in HEADLINES]
        if cases:
            parts += [_machine_line(record), _short_table(cases)]
    return "\n\n".join(parts)


def docs(records: Sequence[Results]) -> str:
    """Every row of every record."""
    parts = _preface(records)
    for record in records:
        parts += [f"### {record.machine['device']}", _machine_line(record), _rates_line(record), _long_table(record)]
    return "\n\n".join(parts)


def _preface(records: Sequence[Results]) -> list[str]:
    """What a reader has to know before the first figure."""
    if not any(record.rows for record in records):
        return [_NO_RECORD]
    return [] if any(r.machine["type"] == "cuda" for r in records) else [_NO_GPU]


def _cases(record: Results) -> list[list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        found.setdefault((row.group, row.case), []).append(row)
    return list(found.values())


def _machine_line(record: Results) -> str:
    m = record.machine
    versions = ", ".join(f"{name} {m['versions'][name]}" for name in ("torch", "triton") if name in m["versions"])
    where = f"{m['cores']} threads" if m["type"] == "cpu" else f"driver {m.get('driver_version') or 'unknown'}"
    return f"{m['device']}, {where}; {versions}; commit {m['commit'] or 'unknown'}, {m['date']}."


def _rates_line(record: Results) -> str:
    rates = record.rates
    products = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.items() if k != "copy")
    line = f"This machine's rates, measured at commit {record.machine['commit'] or 'unknown'}: "
    line += f"copy {rates['copy'] / 1e9:.4g} GB/s (read and written); products {products}."
    if any(_other_commit(row) for row in record.rows):
        line += (
            " Rows that name another commit were kept from an earlier run; their shares of these rates are not shown."
        )
    return line


def _other_commit(row: Row) -> str:
    """ " (at commit abc)" for a row that was kept from a run of another commit; else nothing."""
    return f" (at commit {row.extra['commit'] or 'unknown'})" if "commit" in row.extra else ""


def _short_table(cases: list[list[Row]]) -> str:
    lines = ["| what | official | stock | compiled or graph, best | gdd_fast, best | against stock |"]
    lines.append("|---|---|---|---|---|---|")
    for rows in cases:
        official = _best(rows, lambda p: p.startswith("official"))
        stock = _best(rows, lambda p: p == "stock")
        ready = _best(rows, lambda p: p in ("compile", "max-autotune", "graph"))
        ours = _best(rows, lambda p: "gdd_fast" in p or p.startswith("OneStepGenerator"))
        # times of two commits are no comparison
        alike = len({row.extra.get("commit", ...) for row in rows if row.seconds is not None}) == 1
        gain = f"{stock.seconds / ours.seconds:.2f} x" if alike and stock and ours else "-"
        times = " | ".join(_short_time(row) for row in (official, stock, ready, ours))
        lines.append(f"| {rows[0].group}, {rows[0].case} | {times} | {gain} |")
    return "\n".join(lines)


def _short_time(row: Row | None) -> str:
    return "-" if row is None else format_seconds(row.seconds) + _other_commit(row)


def _best(rows: list[Row], wanted: Callable[[str], bool]) -> Row | None:
    timed = (row for row in rows if wanted(row.peer) and row.seconds is not None)
    return min(timed, key=lambda row: row.seconds, default=None)


def _long_table(record: Results) -> str:
    head = ["what", "case", "peer", "median", "20 % to 80 %", "host", "copy", "products", "images/s", "peak MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in record.rows:
        if row.failure:
            cells = [row.group, row.case, row.peer + _other_commit(row), row.failure.replace("|", "/"), *[""] * 6]
        else:
            low, _, high = row.times
            rate = f"{row.images / row.seconds:.4g}" if row.images and row.seconds else ""
            # the rates are of this record's run, and say nothing of a row that another one took
            shares = (row.copy_fraction(record.rates), row.matmul_fraction(record.rates))
            shares = (None, None) if _other_commit(row) else shares
            cells = [row.group, row.case, row.peer + _other_commit(row), format_seconds(row.seconds)]
            cells += [f"{format_seconds(low)} to {format_seconds(high)}"]
            cells += [format_seconds(row.host[1]) if row.host else "", _percent(shares[0])]
            cells += [_percent(shares[1]), rate]
            cells += [f"{row.peak_bytes / 1e6:.4g}" if row.peak_bytes is not None else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.3g} %"


def replaced(text: str, content: str) -> str:
    """`text` with what stands between the markers replaced; raises ValueError if there are none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"there must be one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


PAGES: dict[str, Callable[[Sequence[Results]], str]] = {"docs/benchmarks.md": docs, "README.md": readme}


def outdated(root: Path = ROOT, folder: Path = FOLDER) -> dict[Path, str]:
    """The pages with markers that do not agree with the results, with the text they should have."""
    records, found = load_all(folder), {}
    for name, make in PAGES.items():
        path = root / name
        text = path.read_text(encoding="utf-8")
        if BEGIN in text:
            expected = replaced(text, make(records))
            if expected != text:
                found[path] = expected
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page does not agree")
    check = parser.parse_args(arguments).check
    pages = outdated()
    for path, text in pages.items():
        print(f"{path.relative_to(ROOT)} {'does not agree with the results' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
