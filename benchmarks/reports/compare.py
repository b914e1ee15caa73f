"""`python -m benchmarks.reports.compare A.json B.json`: what became slower from A to B, beyond the noise.

A row is slower if its 20 % quantile in B lies above the 80 % quantile in A and its median grew by more than
`--threshold`; faster, the other way round. A row that failed in B and not in A counts as slower, and so does one whose
peak memory grew by more than the threshold. How many rows of A are not in B is said, and is no regression. Exit
status 1 if anything is slower, 2 if the two cannot be compared.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.results import Results, Times

WORSE, BETTER = ("slower", "failed", "more memory"), ("faster", "less memory")


class Change(NamedTuple):
    """One row in both files: one of WORSE, of BETTER, or "same"; and how it reads."""

    verdict: str
    line: str


def changes(before: Results, after: Results, threshold: float = 0.05) -> list[Change]:
    """Every row that both have and that had a time in `before`, judged; time first, then memory."""
    old = {row.key: row for row in before.rows if row.times is not None}
    found = []
    for row in after.rows:
        was, where = old.get(row.key), " | ".join(row.key)
        if was is None:
            continue
        if row.times is None:
            found.append(Change("failed", f"{where}: {row.failure}"))
            continue
        verdict = _verdict(was.times, row.times, threshold)
        found.append(Change(verdict, f"{where}: {_ratio(was.seconds * 1e3, row.seconds * 1e3, 'ms')}"))
        if was.peak_bytes and row.peak_bytes and abs(row.peak_bytes / was.peak_bytes - 1) > threshold:
            verdict = "more memory" if row.peak_bytes > was.peak_bytes else "less memory"
            found.append(Change(verdict, f"{where}: {_ratio(was.peak_bytes / 1e6, row.peak_bytes / 1e6, 'MB')}"))
    return found


def _verdict(was: Times, now: Times, threshold: float) -> str:
    (low_a, mid_a, high_a), (low_b, mid_b, high_b) = was, now
    if low_b > high_a and mid_b > mid_a * (1 + threshold):
        return "slower"
    if high_b < low_a and mid_b < mid_a / (1 + threshold):
        return "faster"
    return "same"


def _ratio(before: float, after: float, unit: str) -> str:
    return f"{before:.4g} -> {after:.4g} {unit} ({after / before:.2f} x)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="smallest change of a median that counts")
    parser.add_argument("--other-machine", action="store_true", help="compare although the devices differ")
    args = parser.parse_args(arguments)
    try:
        before, after = Results.load(args.before), Results.load(args.after)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    devices = [r.machine["device"] for r in (before, after)]
    if devices[0] != devices[1] and not args.other_machine:
        print(f"error: taken on {devices[0]} and {devices[1]}; --other-machine compares them anyway", file=sys.stderr)
        return 2
    found = changes(before, after, args.threshold)
    if not found:
        print("error: the files have no row in common", file=sys.stderr)
        return 2
    for change in found:
        if change.verdict != "same":
            print(f"{change.verdict:<12} {change.line}")
    bad, good = (sum(change.verdict in kind for change in found) for kind in (WORSE, BETTER))
    print(f"{len(found)} compared, {bad} worse, {good} better")
    gone = {row.key for row in before.rows if row.times is not None} - {row.key for row in after.rows}
    if gone:
        print(f"{len(gone)} rows of {args.before.name} are not in {args.after.name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
