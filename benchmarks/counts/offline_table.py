"""What the assembler says of every Triton kernel of the networks, without a GPU: registers, spills, shared memory.

    python -m benchmarks.counts.offline_table                brings docs/kernels_table.md up to date
    python -m benchmarks.counts.offline_table --all          the same, and compiles what has not changed too
    python -m benchmarks.counts.offline_table --sample 20    compiles every 20th row, prints and writes nothing

Every kernel that the networks launch (benchmarks/counts/launches.py) is compiled for sm_80 and sm_90: 2,200 times, a
third of a second each on one core, or 6 minutes in all with two idle ones. Rows of operators whose kernels are what
they were are kept. The table is written after every portion, so that a run that was interrupted goes on where it
stopped.
"""

import argparse
import ast
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import tokenize
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.cases.layer_calls import Layers, layers
from benchmarks.counts.launches import OPERATORS, PROGRAMS, Launch, launches
from benchmarks.counts.offline import Resources, compile_triton

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
TABLE = ROOT / "docs" / "kernels_table.md"
ARCHITECTURES = tuple(sorted(PROGRAMS))
_HEAD = """# The kernels as compiled

Made by `python -m benchmarks.counts.offline_table` with Triton {triton}. Every Triton kernel that the networks launch:
NCSN++ at 32 and 64 and ADM at 64 pixels, VGG-16 and EfficientNet-lite0 at 224, batches of 1 to 512, channels_last and
contiguous, bfloat16, float32 and float16.

A row is a kernel with its constants; `compiled` counts what Triton makes of it for the types and for what it knows of
the other arguments. Registers are a thread's, spilled bytes a thread's, shared memory a program's in bytes, each the
most of all that was compiled, as "sm_80 / sm_90" ("-": not launched there). The layer is the first of those that launch
the kernel; `id` is a digest of what was compiled.

Sources: {sources}

"""
_COLUMNS = ("id", "kernel", "constants", "warps", "compiled", "registers", "spilled", "shared", "first layer")


@dataclass(frozen=True)
class Row:
    """A line of the table; resources in the order of ARCHITECTURES."""

    key: str
    kernel: str
    constants: str
    warps: str
    compiled: str
    registers: tuple[int | None, ...]
    spilled: tuple[int | None, ...]
    shared: tuple[int | None, ...]
    first: str

    @classmethod
    def of(cls, variants: Sequence[Launch], resources: Sequence[Sequence[Resources]]) -> "Row":
        """`resources` of every variant on every one of ARCHITECTURES."""

        def most(name: str) -> tuple[int | None, ...]:
            """On each architecture, of the variants that it launches."""
            return tuple(
                max(
                    (getattr(r[i], name) for v, r in zip(variants, resources, strict=True) if a in v.architectures),
                    default=None,
                )
                for i, a in enumerate(ARCHITECTURES)
            )

        first = variants[0]
        warps, count = str(first.case.options["num_warps"]), str(len(variants))
        taken = map(most, ("registers", "spilled", "shared"))
        return cls(row_key(variants), kernel_name(first), _constants(first), warps, count, *taken, first.first)

    @classmethod
    def parse(cls, line: str) -> "Row":
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        taken = (tuple(None if n == "-" else int(n) for n in cell.split(" / ")) for cell in cells[5:8])
        return cls(*cells[:5], *taken, cells[8])

    def __str__(self) -> str:
        taken = (" / ".join("-" if n is None else str(n) for n in cell) for cell in self._resources)
        return (
            f"| {' | '.join((self.key, self.kernel, self.constants, self.warps, self.compiled, *taken, self.first))} |"
        )

    @property
    def _resources(self) -> tuple[tuple[int | None, ...], ...]:
        return self.registers, self.spilled, self.shared

    @property
    def operator(self) -> str:
        return self.kernel.partition(".")[0]

    @property
    def spills(self) -> bool:
        return any(self.spilled)


def kernel_name(launch: Launch) -> str:
    return f"{launch.operator}.{launch.case.kernel}"


def _constants(launch: Launch) -> str:
    return ", ".join(f"{name} {value}" for name, value in launch.case.constants.items() if name.isupper())


def row_key(variants: Iterable[Launch]) -> str:
    """The `id` of a row: a digest of everything that is compiled for it."""
    text = " ".join(sorted(f"{v.key}:{v.architectures}" for v in variants))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def all_rows(of: Layers) -> dict[str, list[Launch]]:
    """The launches on all architectures, grouped into rows, by `row_key`."""
    found: dict[str, Launch] = {}
    for architecture in ARCHITECTURES:
        for key, launch in launches(of, architecture).items():
            before = found[key].architectures if key in found else ()
            first = found[key].first if key in found else launch.first
            found[key] = dataclasses.replace(launch, first=first, architectures=(*before, architecture))
    groups: dict[str, list[Launch]] = {}
    for launch in found.values():
        options = json.dumps(launch.case.options, sort_keys=True)
        groups.setdefault(f"{kernel_name(launch)} {_constants(launch)} {options}", []).append(launch)
    return {row_key(variants): variants for variants in groups.values()}


def measure(rows: Sequence[Sequence[Launch]]) -> list[Row]:
    """Compile each for every architecture."""
    measured = []
    for operator, group in itertools.groupby(rows, lambda variants: variants[0].operator):
        own = list(group)
        cases = [launch.case for variants in own for launch in variants]
        resources = compile_triton(f"gdd_fast.kernels.{operator}", cases, ARCHITECTURES)
        width = len(ARCHITECTURES)
        each = (resources[i : i + width] for i in range(0, len(resources), width))
        measured += [Row.of(variants, list(itertools.islice(each, len(variants)))) for variants in own]
    return measured


def sources() -> dict[str, str]:
    """Digests of what the table is made from: by operator, its kernels without comments and its launch options."""
    tuned = json.loads((KERNELS / "tuned.json").read_text(encoding="utf-8"))

    def options(operator: str) -> str:
        return json.dumps({k: v for k, v in tuned.items() if k.partition(".")[0] == operator}, sort_keys=True)

    return {operator: _digest(" ".join(_code(operator, set())) + options(operator)) for operator in OPERATORS}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _code(module: str, seen: set[str]) -> list[str]:
    """The tokens of kernels/<module>.py, and of what it imports from there, that Triton compiles: @triton.jit functions
    less their docstrings, and constants."""
    seen.add(module)
    text = (KERNELS / f"{module}.py").read_text(encoding="utf-8")
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module not in seen:
            found += _code(node.module, seen)
        elif isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            documented = node.body[:1] if ast.get_docstring(node) else []
            skipped = {line for doc in documented for line in range(doc.lineno, doc.end_lineno + 1)}
            found += _tokens(text, range(node.decorator_list[0].lineno, node.end_lineno + 1), skipped)
        elif isinstance(node, ast.Assign) and "constexpr" in ast.unparse(node.value):
            found += _tokens(text, range(node.lineno, node.end_lineno + 1))
    return found


def _tokens(text: str, lines: range, skipped: Iterable[int] = ()) -> list[str]:
    """A digest of these lines of a module, without comments."""
    dropped = {tokenize.COMMENT, tokenize.NL}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.string for t in tokens if t.start[0] in lines and t.start[0] not in skipped and t.type not in dropped]


def read(path: Path = TABLE) -> tuple[str, dict[str, str], dict[str, Row]]:
    """The Triton version of a table, the digests of its sources, and its rows by key."""
    head, *lines = path.read_text(encoding="utf-8").split("\n|")
    triton = re.search(r"with Triton (\S+)\. ", head)[1]
    digests = dict(entry.split(" ") for entry in re.search(r"^Sources: (.*)$", head, re.M)[1].split(", "))
    rows = [Row.parse(line) for line in lines[2:]]
    return triton, digests, {row.key: row for row in rows}


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    digests = ", ".join(f"{name} {digest}" for name, digest in sources().items())
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS), *map(str, rows)]
    path.write_text(_HEAD.format(triton=version("triton"), sources=digests) + "\n".join(lines) + "\n", encoding="utf-8")


def _kept(path: Path = TABLE) -> dict[str, Row]:
    """Rows that still hold: of this Triton, and of operators whose kernels have not changed."""
    if not path.is_file():
        return {}
    triton, digests, rows = read(path)
    now = sources()
    same = triton == version("triton")
    return {key: row for key, row in rows.items() if same and digests.get(row.operator) == now[row.operator]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counts.offline_table", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--sample", type=int, metavar="N", help="compile every Nth row only, and print")
    parser.add_argument("--all", action="store_true", help="compile also what has not changed")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    wanted = all_rows(layers())
    known = {} if args.all or args.sample else _kept()
    todo = [variants for key, variants in wanted.items() if key not in known][:: args.sample]
    compiled = sum(map(len, todo))
    print(f"{len(wanted)} rows; {compiled} kernels of {len(todo)} to compile for {len(ARCHITECTURES)} architectures")
    with ThreadPoolExecutor(args.processes) as pool:  # each waits for a process of its own
        for done in pool.map(measure, [todo[i : i + 8] for i in range(0, len(todo), 8)]):
            known |= {row.key: row for row in done}
            print(f"{len(known)} rows", flush=True)
            if not args.sample:
                write(known[key] for key in wanted if key in known)
    rows = [known[key] for key in wanted if key in known]
    if args.sample:
        print("\n".join(map(str, rows)))
    else:
        write(rows)
    spilling = [row for row in rows if row.spills]
    print("\n".join(("no kernel spills" if not spilling else f"{len(spilling)} spill:", *map(str, spilling))))
    raise SystemExit(1 if spilling else 0)


if __name__ == "__main__":
    main()
