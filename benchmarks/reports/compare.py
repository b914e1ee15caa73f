"""`python -m benchmarks.reports.compare A.json B.json`: what became slower from A to B, beyond the noise.

A row is slower if its 20 % quantile in B lies above the 80 % quantile in A and its median grew by more than
`--threshold`; faster, the other way round. A row that failed in B and not in A counts as slower, and so does one whose
peak memory grew by more than the threshold. How many rows of A are not in B is said, and is no regression. Exit
status 1 if anything is slower, 2 if the two cannot be compared.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.results import Results, Row


@dataclass(frozen=True)
class Change:
    """One row in both files. `verdict`: "slower", "faster", "failed", "more memory", "less memory" or "same"."""

    row: Row
    verdict: str
    before: float | None
    after: float | None

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "failed", "more memory")

    def __str__(self) -> str:
        where = f"{self.row.group} | {self.row.case} | {self.row.peer}"
        if self.verdict == "failed":
            return f"failed       {where}: {self.row.failure}"
        unit, scale = ("MB", 1e-6) if "memory" in self.verdict else ("ms", 1e3)
        ratio = self.after / self.before if self.before else float("inf")
        return (
            f"{self.verdict:<12} {where}: {self.before * scale:.4g} -> {self.after * scale:.4g} {unit} ({ratio:.2f} x)"
        )


def changes(before: Results, after: Results, threshold: float = 0.05) -> list[Change]:
    """Every row that both have and that had a time in `before`, judged; time first, then memory."""
    old = {row.key: row for row in before.rows}
    found = []
    for row in after.rows:
        was = old.get(row.key)
        if was is None or was.times is None:
            continue
        if row.times is None:
            found.append(Change(row, "failed", was.seconds, None))
            continue
        found.append(Change(row, _verdict(was, row, threshold), was.seconds, row.seconds))
        if was.peak_bytes and row.peak_bytes and abs(row.peak_bytes / was.peak_bytes - 1) > threshold:
            verdict = "more memory" if row.peak_bytes > was.peak_bytes else "less memory"
            found.append(Change(row, verdict, was.peak_bytes, row.peak_bytes))
    return found


def _verdict(was: Row, now: Row, threshold: float) -> str:
    (low_a, mid_a, high_a), (low_b, mid_b, high_b) = was.times, now.times
    if low_b > high_a and mid_b > mid_a * (1 + threshold):
        return "slower"
    if high_b < low_a and mid_b < mid_a / (1 + threshold):
        return "faster"
    return "same"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="smallest change of a median that counts")
    parser.add_argument("--other-machine", action="store_true", help="compare although the devices differ")
    args = parser.parse_args(arguments)
    before, after = Results.load(args.before), Results.load(args.after)
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
            print(change)
    bad = sum(change.regression for change in found)
    print(f"{len(found)} compared, {bad} worse, {sum(c.verdict in ('faster', 'less memory') for c in found)} better")
    gone = {row.key for row in before.rows if row.times is not None} - {row.key for row in after.rows}
    if gone:
        print(f"{len(gone)} rows of {args.before.name} are not in {args.after.name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
