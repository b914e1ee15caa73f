"""What the assembler says of every Triton kernel of the networks, without a GPU: registers, spills, shared memory.

    python -m benchmarks.counts.offline_table                brings docs/kernels_table.md up to date
    python -m benchmarks.counts.offline_table --sample 20    compiles every 20th row, prints and writes nothing
    python -m benchmarks.counts.offline_table --all          compiles every form of every row, prints what spills

The kernels that the networks launch (benchmarks/counts/launches.py) are grouped into rows by what decides their code:
the tile, and which loops there are. Of a row the form that asks for most is compiled for sm_80 and sm_90
(`representative`), 250 kernels in all, a third of a second each on an idle core. Rows of operators whose kernels are
what they were are kept. The table is written after every portion, so that a run that was interrupted goes on where it
stopped.
"""

import argparse
import ast
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.cases.layer_calls import Layers, layers
from benchmarks.counts.launches import OPERATORS, PROGRAMS, Launch, launches
from benchmarks.counts.offline import Resources, compile_triton
from benchmarks.counts.sass import resident_programs

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
TABLE = ROOT / "docs" / "kernels_table.md"
ARCHITECTURES = tuple(sorted(PROGRAMS))
_HEAD = """# The kernels as compiled

Made by `python -m benchmarks.counts.offline_table` with Triton {triton}. Every Triton kernel that the networks launch:
NCSN++ at 32 and 64 and ADM at 64 pixels, VGG-16 and EfficientNet-lite0 at 224, batches of 1, 16 and 256, channels_last
and contiguous, bfloat16 and float32.

A row is a kernel with its tile; `forms` counts the variants that Triton makes of it for types, group sizes and what it
knows of the other arguments. The most demanding one is compiled: in bfloat16 if there is such a form, with the most
arguments and the fewest channels in its block, of the layer in the last column; `id` is a digest of all forms.
Registers and spilled bytes are per thread, shared memory is in bytes per program. From the machine code come
`instructions`, a thread's in total; `per result`, those of its loops over tiles (benchmarks/counts/sass.py) per
element of the tile that a thread has, for a pair of maps the mean of both; `load`, the mean width of these loops'
loads in bytes; and `in flight`, the kilobytes that a multiprocessor has requested at once, with as many programs as
its registers and shared memory hold, less those of lanes without a channel. Each is given as "sm_80 / sm_90".

Sources: {sources}

"""
_COLUMNS = (
    "id", "kernel", "constants", "warps", "forms",
    "registers", "spilled", "shared", "instructions", "per result", "load", "in flight", "layer",
)  # fmt: skip
_NUMBERS = slice(5, 12)
_FOLDED = ("GROUP", "BLOCK_G", "CHANNELS", "SILU")  # constants by which rows are not told apart
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A line of the table; resources in the order of ARCHITECTURES."""

    key: str
    kernel: str
    constants: str
    warps: str
    forms: str
    registers: Numbers
    spilled: Numbers
    shared: Numbers
    instructions: Numbers
    per_result: Numbers
    load: Numbers
    in_flight: Numbers
    layer: str

    @classmethod
    def of(cls, variants: Sequence[Launch], resources: Sequence[Resources]) -> "Row":
        """`resources` of the representative on every one of ARCHITECTURES."""
        launch = representative(variants)

        def each(value: Callable[[Resources], float]) -> Numbers:
            return tuple(round(value(r), 1) for r in resources)

        warps, count = str(launch.case.options["num_warps"]), str(len(variants))
        return cls(
            row_key(variants), kernel_name(launch), _constants(launch), warps, count,
            each(lambda r: r.registers), each(lambda r: r.spilled), each(lambda r: r.shared),
            each(lambda r: r.code.instructions), each(lambda r: instructions_per_result(launch, r)),
            each(lambda r: r.code.load_bytes), each(lambda r: kilobytes_in_flight(launch, r)), launch.first,
        )  # fmt: skip

    @classmethod
    def parse(cls, line: str) -> "Row":
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        numbers = (tuple(map(float, cell.split(" / "))) for cell in cells[_NUMBERS])
        return cls(*cells[:5], *numbers, cells[12])

    def __str__(self) -> str:
        values = list(dataclasses.astuple(self))
        values[_NUMBERS] = (" / ".join(f"{n:.1f}".removesuffix(".0") for n in cell) for cell in values[_NUMBERS])
        return f"| {' | '.join(values)} |"

    @property
    def operator(self) -> str:
        return self.kernel.partition(".")[0]

    @property
    def spills(self) -> bool:
        return any(self.spilled)


def instructions_per_result(launch: Launch, resources: Resources) -> float:
    """Instructions of the loops over tiles, per element of the tile that a thread has."""
    constants = launch.case.constants
    tile = math.prod(v for name, v in constants.items() if name.startswith("BLOCK") and name != "BLOCK_G")
    tile *= 8 if launch.operator == "relu_bits" else 1  # bits of a byte
    maps = 2 if "skip" in launch.case.signature and launch.operator == "group_norm_silu" else 1
    return resources.code.tile_instructions / maps / (tile / _threads(launch))


def kilobytes_in_flight(launch: Launch, resources: Resources) -> float:
    """Loads under way on a multiprocessor full of such programs; lanes without a channel ask for nothing."""
    constants, warps = launch.case.constants, launch.case.options["num_warps"]
    programs = resident_programs(resources.architecture, resources.registers, warps, resources.shared)
    used = constants["CHANNELS"] / constants["BLOCK_C"] if "CHANNELS" in constants else 1
    return programs * _threads(launch) * resources.code.outstanding * used / 1024


def _threads(launch: Launch) -> int:
    return 32 * launch.case.options["num_warps"]


def kernel_name(launch: Launch) -> str:
    return f"{launch.operator}.{launch.case.kernel}"


def _constants(launch: Launch) -> str:
    told = (f"{k} {v}" for k, v in launch.case.constants.items() if k.isupper() and k not in _FOLDED)
    return ", ".join(told)


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


def representative(variants: Sequence[Launch]) -> Launch:
    """The form that is compiled for a row, as the table's head says."""

    def asks_for(launch: Launch) -> tuple[float, ...]:
        types, constants = launch.case.signature, launch.case.constants
        narrow, most = "*bf16" in types.values(), (constants.get("SILU", 0), constants.get("BLOCK_G", 0))
        return narrow, len(types), -constants.get("CHANNELS", 0), *most

    return max(variants, key=asks_for)


def measure(rows: Sequence[Sequence[Launch]]) -> list[Row]:
    """Compile each for every architecture."""
    measured = []
    for operator, group in itertools.groupby(rows, lambda variants: variants[0].operator):
        own = list(group)
        cases = [representative(variants).case for variants in own]
        resources = compile_triton(f"gdd_fast.kernels.{operator}", cases, ARCHITECTURES)
        width = len(ARCHITECTURES)
        measured += [Row.of(variants, resources[i * width : (i + 1) * width]) for i, variants in enumerate(own)]
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
    """Rows that still hold: of this Triton and these columns, and of operators whose kernels have not changed."""
    if not path.is_file() or " | ".join(_COLUMNS) not in path.read_text(encoding="utf-8"):
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
    parser.add_argument("--all", action="store_true", help="compile every form, and print what spills")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.processes < 1 or (args.sample is not None and args.sample < 1):
        parser.error("--sample and --processes must be at least 1")
    os.environ["TRITON_INTERPRET"] = "0"
    wanted = all_rows(layers())
    if args.all:
        wanted = {row_key([form]): [form] for variants in wanted.values() for form in variants}
    trial = args.all or args.sample
    known = {} if trial else _kept()
    todo = [variants for key, variants in wanted.items() if key not in known][:: args.sample]
    print(f"{len(wanted)} rows; {len(todo)} kernels to compile for {len(ARCHITECTURES)} architectures", flush=True)
    with ThreadPoolExecutor(args.processes) as pool:  # each waits for a process of its own
        for done in pool.map(measure, [todo[i : i + 24] for i in range(0, len(todo), 24)]):
            known |= {row.key: row for row in done}
            print(f"{len(known)} rows", flush=True)
            if not trial:
                write(known[key] for key in wanted if key in known)
    rows = [known[key] for key in wanted if key in known]
    if args.sample:
        print("\n".join(map(str, rows)))
    if not trial:
        write(rows)
    spilling = [row for row in rows if row.spills]
    print("\n".join(("no kernel spills" if not spilling else f"{len(spilling)} spill:", *map(str, spilling))))
    raise SystemExit(1 if spilling else 0)


if __name__ == "__main__":
    main()
