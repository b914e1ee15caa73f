"""`python -m benchmarks.merge INTO.json MORE.json ...`: the records of several calls on one kind of GPU, as one.

The later file counts where two have the same row, unless it has no time and the earlier one has: that is said. Rows of
another commit than the last file's carry their own. Exit status 2 if the files are of different devices.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.results import Results

_LISTS = ("verdicts", "cut_off", "died")
_OF_ONE_RUN = ("running", "done")
_KIND = ("device", "cpu_capability", "onednn_max_cpu_isa")
"""What the machines of all records have in common; a processor that imitates an older one is another."""


def merged(records: Sequence[Results]) -> tuple[Results, list[str]]:
    """One record, and a line for each row that lost against an earlier one. Raises ValueError for other devices."""
    last = records[-1]
    whole, lines = Results(last.machine, last.rates), []
    for record in records:
        for name in _KIND:
            of, other = record.machine.get(name), last.machine.get(name)
            if of != other:
                raise ValueError(f"one file is of {name} {of} and another of {other}")
        mark = {} if record.machine["commit"] == last.machine["commit"] else {"commit": record.machine["commit"]}
        timed = {row.key for row in whole.rows if row.seconds is not None}
        for row in record.rows:
            if row.seconds is None and row.key in timed:
                lines.append(f"{' | '.join(row.key)}: an earlier time is kept, a later file has: {row.failure}")
            else:
                whole.add([replace(row, extra={**mark, **row.extra})])
        for name, note in record.notes.items():
            if name in _LISTS:
                for part, entries in note.items():
                    known = whole.notes.setdefault(name, {}).setdefault(part, [])
                    known += [entry for entry in entries if entry not in known]
            elif name not in _OF_ONE_RUN:
                whole.notes[name] = note
    return whole, lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__.split("\n", 1)[0])
    parser.add_argument("into", type=Path, help="the earliest; it is written anew")
    parser.add_argument("more", type=Path, nargs="+", help="later ones, in order")
    args = parser.parse_args(arguments)
    try:
        whole, lines = merged([Results.load(path) for path in (args.into, *args.more)])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whole.save(args.into)
    print("\n".join([*lines, f"{len(whole.rows)} rows in {args.into}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
