"""`python -m benchmarks.reports.tables`: the tables of docs/benchmarks.md and README.md, of benchmarks/results/*.json.

What stands between `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->` is replaced: in the README a short
table of the newest record, in the docs every row, one table per group. `--check` changes nothing and exits with 1 if a
file does not agree with the results.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.results import FOLDER, Results, Row, format_seconds

ROOT = Path(__file__).resolve().parents[2]
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
    """A short table of the newest record, of a GPU if there is one and of no imitated processor: one line per case, its
    peers side by side, and how many times faster ours is than `stock`."""
    parts = _preface(records)
    of_first_kind = [r for r in records if r.machine["type"] == records[0].machine["type"]]
    newest_last = sorted(of_first_kind, key=lambda r: (not r.machine.get("onednn_max_cpu_isa"), r.machine["date"]))
    for record in newest_last[-1:]:
        cases = [case for case in _cases(record) if case[0].group in HEADLINES]
        if cases:
            parts += [_machine_line(record), _short_table(cases)]
    return "\n\n".join(parts)


def docs(records: Sequence[Results]) -> str:
    """Every row of every record: one table per group, one case after the other."""
    parts = _preface(records)
    for record in records:
        parts += [f"### {record.machine['device']}", _machine_line(record), _rates_line(record)]
        for group, cases in _groups(record).items():
            parts += [f"#### {group}", _long_table(cases, record.rates, _busy(record))]
    return "\n\n".join(parts)


def _preface(records: Sequence[Results]) -> list[str]:
    """What a reader has to know before the first figure."""
    if not any(record.rows for record in records):
        return [_NO_RECORD]
    return [] if any(r.machine["type"] == "cuda" for r in records) else [_NO_GPU]


def _groups(record: Results) -> dict[str, list[list[Row]]]:
    """The cases of each group, both directions of an operator beside each other."""
    found: dict[str, list[list[Row]]] = {}
    for case in _cases(record):
        found.setdefault(case[0].group, []).append(case)
    operators = list(dict.fromkeys(group.split(" forward")[0] for group in found))
    return {group: found[group] for group in sorted(found, key=lambda g: operators.index(g.split(" forward")[0]))}


def _cases(record: Results) -> list[list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        found.setdefault((row.group, row.case), []).append(row)
    return list(found.values())


def _machine_line(record: Results) -> str:
    m = record.machine
    versions = ", ".join(f"{name} {m['versions'][name]}" for name in ("torch", "triton") if name in m["versions"])
    where = f"{m['cores']} threads" if m["type"] == "cpu" else f"driver {m.get('driver_version') or 'unknown'}"
    if m.get("onednn_max_cpu_isa"):  # an older processor is imitated
        where += f", ONEDNN_MAX_CPU_ISA={m['onednn_max_cpu_isa']}, PyTorch's {m['cpu_capability']}"
    elif sets := m.get("instruction_sets"):
        kinds = {"bfloat16": {"avx512_bf16", "bf16"}, "AMX": {"amx_tile"}}
        units = [name for name, flags in kinds.items() if flags & set(sets)]
        where += f", {m['cpu_capability']} {'with ' + ' and '.join(units) if units else 'without bfloat16'}"
    line = f"{m['device']}, {where}; {versions}; commit {m['commit'] or 'unknown'}, {m['date']}."
    if _busy(record):
        line += (
            f" **Other programs ran** (load {m['load']:g} at the start): compare CPU times, which are of all threads."
        )
    return line


def _busy(record: Results) -> bool:
    """Whether more programs ran than there are cores when the record was begun, so that wall times mean little."""
    return record.machine["type"] == "cpu" and record.machine.get("load", 0) > record.machine["cores"]


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
        stock = _stock(rows)
        ready = _best(rows, lambda p: p in ("compile", "max-autotune", "graph"))
        ours = _best(rows, lambda p: "gdd_fast" in p or p.startswith("OneStepGenerator"))
        gain = _ratio(stock, ours) or "-"
        times = " | ".join(_short_time(row) for row in (official, stock, ready, ours))
        lines.append(f"| {rows[0].group}, {rows[0].case} | {times} | {gain} |")
    return "\n".join(lines)


def _stock(rows: list[Row]) -> Row | None:
    return _best(rows, lambda p: p == "stock")


def _ratio(base: Row | None, row: Row | None) -> str:
    """How many times faster than `base` a row is; nothing if one has no time or they are of different commits."""
    if base is None or row is None or base.extra.get("commit", ...) != row.extra.get("commit", ...):
        return ""
    return f"{base.seconds / row.seconds:.2f} x" if base.seconds and row.seconds else ""


def _short_time(row: Row | None) -> str:
    return "-" if row is None else format_seconds(row.seconds) + _other_commit(row)


def _best(rows: list[Row], wanted: Callable[[str], bool]) -> Row | None:
    timed = (row for row in rows if wanted(row.peer) and row.seconds is not None)
    return min(timed, key=lambda row: row.seconds, default=None)


def _long_table(cases: list[list[Row]], rates: dict[str, float], busy: bool) -> str:
    """One line per row; columns that would be empty are left out."""
    lines = [
        {
            "case": "" if index else row.case,
            "peer": row.peer + _other_commit(row),
            **_cells(row, rows[0] if row.group.startswith("waterfall") else _stock(rows), rates, busy),
        }
        for rows in cases
        for index, row in enumerate(rows)
    ]
    head = [name for name in lines[0] if any(line[name] for line in lines)]
    table = [head, ["---"] * len(head), *([line[name] for name in head] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _cells(row: Row, base: Row | None, rates: dict[str, float], busy: bool) -> dict[str, str]:
    """The columns behind case and peer; CPU time where wall time is not to be trusted."""
    if row.failure:
        return dict.fromkeys(_COLUMNS, "") | {"median": row.failure.replace("|", "/")}
    low, _, high = row.times
    # the rates are of this record's run, and say nothing of a row that another one took
    shares = (None, None) if _other_commit(row) else (row.copy_fraction(rates), row.matmul_fraction(rates))
    cells = (
        format_seconds(row.seconds),
        f"{format_seconds(low)} to {format_seconds(high)}",
        format_seconds(row.cpu[1]) if busy and row.cpu else "",
        "" if row is base else _ratio(base, row),
        format_seconds(row.host[1]) if row.host else "",
        *map(_percent, shares),
        f"{row.images / row.seconds:.4g}" if row.images and row.seconds else "",
        f"{row.peak_bytes / 1e6:.4g}" if row.peak_bytes is not None else "",
    )
    return dict(zip(_COLUMNS, cells, strict=True))


_COLUMNS = ("median", "20 % to 80 %", "CPU", "times faster", "host", "copy", "products", "images/s", "peak MB")


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.tables", description=__doc__.split("\n", 1)[0])
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
