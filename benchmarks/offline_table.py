"""What the assembler says of every Triton kernel of the networks, without a GPU: registers, spills, shared memory.

    python -m benchmarks.offline_table                writes docs/kernels_table.md
    python -m benchmarks.offline_table --sample 20    compiles every 20th kernel, prints and writes nothing

Every kernel that the networks launch (benchmarks/launches.py) is compiled for sm_80 and sm_90, about a second each on
one core: 15 minutes in all with two processes. Rows of kernels that are in the table already are kept with --keep, for
when layers or launch rules have changed and the kernels have not.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.launches import PROGRAMS, Launch, launches
from benchmarks.shapes import Layers, layers
from tests.offline import Resources, compile_triton

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernels_table.md"
ARCHITECTURES = tuple(sorted(PROGRAMS))
_HEAD = """# The kernels as compiled

Made by `python -m benchmarks.offline_table` with Triton {triton}. Every Triton kernel that the networks launch: NCSN++
at 32 and 64 and ADM at 64 pixels, VGG-16 and EfficientNet-lite0 at 224, batches of 1 to 512, bfloat16 and float32,
channels_last. Registers are a thread's, spilled bytes a thread's, shared memory a program's in bytes, each as
"sm_80 / sm_90". The layer is the first of those that launch the kernel; `id` is a digest of what it is compiled for.

"""
_COLUMNS = ("id", "kernel", "constants", "warps", "registers", "spilled", "shared", "first layer")


@dataclass(frozen=True)
class Row:
    """A line of the table; resources in the order of ARCHITECTURES."""

    key: str
    kernel: str
    constants: str
    warps: str
    registers: tuple[int, ...]
    spilled: tuple[int, ...]
    shared: tuple[int, ...]
    first: str

    @classmethod
    def of(cls, launch: Launch, resources: Sequence[Resources]) -> "Row":
        case = launch.case
        constants = (f"{name} {value}" for name, value in case.constants.items() if name.isupper())
        taken = (tuple(getattr(r, name) for r in resources) for name in ("registers", "spilled", "shared"))
        kernel = f"{launch.operator}.{case.kernel}"
        return cls(launch.key, kernel, ", ".join(constants), str(case.options["num_warps"]), *taken, launch.first)

    @classmethod
    def parse(cls, line: str) -> "Row":
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        taken = (tuple(map(int, cell.split(" / "))) for cell in cells[4:7])
        return cls(*cells[:4], *taken, cells[7])

    def __str__(self) -> str:
        taken = (" / ".join(map(str, cell)) for cell in (self.registers, self.spilled, self.shared))
        return f"| {' | '.join((self.key, self.kernel, self.constants, self.warps, *taken, self.first))} |"


def all_launches(of: Layers) -> dict[str, Launch]:
    """Those of every architecture, by key."""
    return {key: launch for architecture in ARCHITECTURES for key, launch in launches(of, architecture).items()}


def measure(found: Sequence[Launch]) -> list[Row]:
    """Compile each for every architecture."""
    rows = []
    for operator in dict.fromkeys(launch.operator for launch in found):
        own = [launch for launch in found if launch.operator == operator]
        resources = compile_triton(f"gdd_fast.kernels.{operator}", [launch.case for launch in own], ARCHITECTURES)
        width = len(ARCHITECTURES)
        rows += [Row.of(launch, resources[width * i : width * (i + 1)]) for i, launch in enumerate(own)]
    return rows


def read(path: Path = TABLE) -> tuple[str, dict[str, Row]]:
    """The Triton version of a table, and its rows by key."""
    head, *lines = path.read_text(encoding="utf-8").split("\n|")
    triton = head.partition("with Triton ")[2].split(" ")[0].rstrip(".")
    rows = [Row.parse(line) for line in lines[2:]]
    return triton, {row.key: row for row in rows}


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS), *map(str, rows)]
    path.write_text(_HEAD.format(triton=version("triton")) + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline_table", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sample", type=int, metavar="N", help="compile every Nth kernel only, and print")
    parser.add_argument("--keep", action="store_true", help="keep the table's rows, compile what it lacks")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    wanted = all_launches(layers())
    known = read()[1] if args.keep and TABLE.is_file() else {}
    todo = [launch for key, launch in wanted.items() if key not in known][:: args.sample]
    print(f"{len(wanted)} kernels, {len(todo)} to compile for {len(ARCHITECTURES)} architectures", flush=True)
    portions = [todo[i : i + 16] for i in range(0, len(todo), 16)]
    with ThreadPoolExecutor(args.processes) as pool:  # each waits for a process of its own
        for done in pool.map(measure, portions):
            known |= {row.key: row for row in done}
            print(f"{len(known)} rows", flush=True)
    rows = [known[key] for key in wanted if key in known]
    if args.sample:
        print("\n".join(map(str, rows)))
    else:
        write(rows)
    spilling = [row for row in rows if any(row.spilled)]
    print("\n".join(("no kernel spills" if not spilling else f"{len(spilling)} spill:", *map(str, spilling))))
    raise SystemExit(1 if spilling else 0)


if __name__ == "__main__":
    main()
