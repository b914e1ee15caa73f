"""`python -m benchmarks.gpu_battery`: everything worth knowing of one GPU machine, in a given time.

    python -m benchmarks.gpu_battery                            build, check, then the parts of a first run (`DEFAULT`)
    python -m benchmarks.gpu_battery --only tune,compiled       some parts; rows of the others are kept
    python -m benchmarks.gpu_battery --device cpu --smoke       a dry run of these parts, about a minute

Needs the checkout, torch and numpy; no pytest, and nothing is installed or fetched. Each part (battery_parts.py) runs
in a process of its own, correctness in several at once, with a share of what is left of `--budget-s`, and saves after
every row: what cuts it off costs the row in progress. A process that dies (a fault in a kernel ends a CUDA process for
good) is started again behind the case that killed it. What failed is listed at the end by operator, shape, peer, error.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.battery_parts import DEFAULT, PARTS, PROCESS_BYTES, cases_of
from benchmarks.harness import machine
from benchmarks.harness.case import CANNOT_RUN, NO_TIME, OUT_OF_MEMORY, Effort, computes, measure_case, release
from benchmarks.harness.results import FOLDER, Results, Row

ROOT = Path(__file__).resolve().parents[1]
_BUILD_SECONDS = 170
_GRACE_SECONDS = 25  # for the row in progress when a part's time is up
_DIED = 3
_END_SECONDS = 5  # for a build to end by itself
_LATE = "still busy when its time was up"
_RIGHT = "right"


@dataclass(frozen=True)
class Options:
    """What a part's process is told."""

    device: str
    out: str
    smoke: bool
    deadline: float
    """In seconds of time.time()."""
    taken: str | None = None
    """A folder where the processes of a part that has several mark each case that one of them has begun."""

    def left(self) -> float:
        return self.deadline - time.time()

    def take(self, number: int) -> bool:
        """Whether the case of this number is this process's to run: no other one has taken it."""
        if self.taken is None:
            return True
        try:
            (Path(self.taken) / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def run_part(part: str, options: Options) -> int:
    """In a process of its own: measure the cases of `part` that the file has no rows of. Status `_DIED` on a fault."""
    device, path = torch.device(options.device), Path(options.out)
    results = Results.load(path)
    if part == "tune":
        from benchmarks.reports.tune import tune

        return 0 if tune(results, path, device, options.left, smoke=options.smoke) else _DIED
    seconds = PARTS[part].seconds
    effort = Effort(min(seconds, 0.02) if options.smoke else seconds, least=3)
    done = results.notes.setdefault("done", {}).setdefault(part, [])
    cases = cases_of(part, options.smoke)
    for number, case in enumerate(cases):
        if number in done or not options.take(number):
            continue
        if options.left() <= 0:
            _note(results, "cut_off", part, f"{case}, number {number + 1} of {len(cases)}")
            break
        results.notes["running"] = [part, number, case.group, case.name]
        results.save(path)
        died = False
        for row in measure_case(case, device, effort, stop=lambda: options.left() <= 0):
            _keep(results, part, row)
            results.save(path)
            died = bool(row.failure) and row.failure not in (OUT_OF_MEMORY, NO_TIME) and not computes(device)
            if died:
                break
        done.append(number)
        del results.notes["running"]
        results.save(path)
        if died:
            return _DIED
    results.save(path)
    return 0


def _keep(results: Results, part: str, row: Row) -> None:
    """A row into the record, or where nothing is timed its verdict into the notes; what time ran out at, noted too."""
    verdict = row.failure or (_RIGHT if row.seconds is None else f"{row.seconds * 1e3:.4g} ms")
    print(f"{row.group} | {row.case} | {row.peer}: {verdict}", flush=True)
    if row.failure == NO_TIME:
        _note(results, "cut_off", part, f"{row.group} | {row.case} before {row.peer}")
    elif PARTS[part].seconds:
        results.add([row])
    else:
        _note(results, "verdicts", part, [row.group, row.case, row.peer, verdict])


def _note(results: Results, kind: str, part: str, what: Any) -> None:
    results.notes.setdefault(kind, {}).setdefault(part, []).append(what)


def supervise(part: str, options: Options, say: Callable[[str], None]) -> None:
    """Run a part in processes of its own until it is through or out of time, however often one dies.

    Each of them leaves its case behind; one that left none is the last. The tuning has no cases, but leaves entries.
    """
    path = Path(options.out)
    tuned = -1
    for attempt in itertools.count():
        command = [sys.executable, "-m", "benchmarks.gpu_battery", "--part", part, json.dumps(asdict(options))]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=max(options.left(), 0) + _GRACE_SECONDS).returncode
        except subprocess.TimeoutExpired:
            status = _LATE
        if status == 0:
            return
        results = Results.load(path)
        running = results.notes.pop("running", None)
        say(f"{part}: process ended with {status} at {running}")
        if status == _LATE and running is not None:
            _note(results, "cut_off", part, " | ".join(running[2:]))
        else:
            _note(results, "died", part, [str(status), running])
        if status not in (_LATE, _DIED) and running is not None:  # a crash left no row
            _keep(results, part, Row(*running[2:], "-", failure=f"the process ended with status {status}"))
            results.notes["done"][part].append(running[1])
        results.save(path)
        before, tuned = tuned, len(results.notes.get("tuning", {}))
        if part == "tune" and tuned == before:  # it would end in the same way again
            return
        if running is None and status != _DIED and part != "tune":
            return
        if options.left() < 5:
            return
        say(f"{part}: started again, {attempt + 1}")


def supervise_together(part: str, options: Options, say: Callable[[str], None], processes: int) -> None:
    """`supervise` for so many processes at once, each with a file of its own; the next case is whose that is free.

    What memory did not suffice for then gets the GPU for itself.
    """
    results = Results.load(Path(options.out))
    with tempfile.TemporaryDirectory() as folder:
        own = [replace(options, out=f"{folder}/{i}.json", taken=folder) for i in range(processes)]
        for one in own:
            Results(results.machine, results.rates).save(Path(one.out))
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(lambda one: supervise(part, one, say), own))
        for found in (Results.load(Path(one.out)) for one in own):
            results.add(found.rows)
            for kind in ("verdicts", "cut_off", "died"):
                for what in found.notes.get(kind, {}).get(part, []):
                    _note(results, kind, part, what)
    again = _without_memory(results, part)
    cases = cases_of(part, options.smoke)
    results.notes.setdefault("done", {})[part] = [
        number for number, case in enumerate(cases) if (case.group, case.name) not in again
    ]
    results.save(Path(options.out))
    if again and options.left() > 5:
        say(f"{part}: {len(again)} cases again, one after the other: memory did not suffice for all at once")
        supervise(part, options, say)


def _without_memory(results: Results, part: str) -> set[tuple[str, str]]:
    """The cases in which a peer had too little memory; what is known of them is dropped."""
    verdicts = results.notes.get("verdicts", {}).get(part, [])
    again = {(group, case) for group, case, _, verdict in verdicts if verdict == OUT_OF_MEMORY}
    verdicts[:] = [verdict for verdict in verdicts if (verdict[0], verdict[1]) not in again]
    return again


def processes_of(part: str, device: torch.device) -> int:
    """How many at once: what the part is good for, the cores feed and the GPU's memory holds."""
    room = PARTS[part].processes
    if device.type == "cuda":
        room = min(room, torch.cuda.get_device_properties(device).total_memory // PROCESS_BYTES)
    return max(min(room, (os.cpu_count() or 1) // 2), 1)


def build_extension(device: torch.device, seconds: float) -> str:
    """Build gdd_fast._C in place for this GPU; what came of it. Without nvcc or on a CPU, its C++ alone."""
    environment = dict(os.environ)
    cuda = device.type == "cuda" and (shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists())
    environment["GDD_FAST_CUDA"] = "1" if cuda else "0"
    if cuda:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    start = time.time()
    try:
        status, output = run_group(command, environment, seconds)
    except subprocess.TimeoutExpired:
        return f"not built: still busy after {seconds:.0f} s"
    if status:
        return "not built: " + " / ".join(output.strip().splitlines()[-8:])[:2000]
    return f"built {'with' if cuda else 'without'} CUDA in {time.time() - start:.0f} s"


def run_group(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Status and what was printed; after subprocess.TimeoutExpired nothing that the command started goes on."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:  # an interrupt too: it does not reach another session
            os.killpg(process.pid, signal.SIGTERM)  # ninja hands it on to the compilers, which are in other groups
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, errors or output


def begin(
    path: Path, device: torch.device, notes: dict[str, str], fresh: Iterable[str], seconds: float, commit: str | None
) -> None:
    """The file a battery fills: the machine and its rates anew; what is known of parts that are not `fresh` is kept."""
    rates = machine.rates(device, seconds=seconds)
    described = machine.describe(device)  # behind them, while the clocks are still up
    described["commit"] = commit or described["commit"]
    if "error" in (described["extension"] or {}):
        notes = {**notes, "extension problem": described["extension"]["error"]}
    release(device)  # other processes will want the memory
    results = Results.continued(path, described, rates)
    if "running" in results.notes:  # an earlier run was ended from outside
        part, _, *case = results.notes["running"]
        _note(results, "cut_off", part, " | ".join(case))
    for part in fresh:
        for kind in ("verdicts", "cut_off", "died"):
            results.notes.get(kind, {}).pop(part, None)
        if part == "tune":
            results.notes.pop("tuning", None)
    for key in ("running", "done", "extension problem"):
        results.notes.pop(key, None)
    results.notes |= notes
    results.save(path)


def summary(results: Results) -> list[str]:
    """What did not come out, a line each, and how much did."""
    failed = [row for row in results.rows if row.failure]
    lines = [f"{len(results.rows)} rows, {len(failed)} of them without a time"]
    lines += [f"  {row.group} | {row.case} | {row.peer}: {row.failure}" for row in failed]
    for part, verdicts in results.notes.get("verdicts", {}).items():
        right = Counter(peer for *_, peer, verdict in verdicts if verdict == _RIGHT)
        missing = Counter((peer, verdict) for *_, peer, verdict in verdicts if verdict.startswith(CANNOT_RUN))
        wrong = [v for v in verdicts if v[3] != _RIGHT and not v[3].startswith(CANNOT_RUN)]
        cases = len({(group, case) for group, case, *_ in verdicts})
        lines.append(f"{part}: {cases} cases compared, {len(wrong)} failures")
        lines += [f"  {group} | {case} | {peer}: {verdict}" for group, case, peer, verdict in wrong]
        lines += ["  right: " + ", ".join(f"{peer} in {count}" for peer, count in right.items())] if right else []
        lines += [f"  {peer} not checked in {count} cases: {verdict}" for (peer, verdict), count in missing.items()]
    for part, cases in results.notes.get("cut_off", {}).items():
        lines += [f"{part}: out of time at {case}" for case in cases]
    for part, deaths in results.notes.get("died", {}).items():
        lines += [f"{part}: died with status {status} at {running}" for status, running in deaths]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_battery", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--budget-s", type=float, default=530.0, help="seconds in all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a few small cases of every part")
    parser.add_argument("--no-build", action="store_true", help="use the extension as it is")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--commit", help="what is measured, for a machine that has the files without their history")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part:
        return run_part(args.part[0], Options(**json.loads(args.part[1])))
    deadline = time.time() + args.budget_s
    asked = args.only.split(",")
    if set(asked) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, not {args.only}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU can be used here; --device cpu --smoke is the dry run")
    device, parts = torch.device(args.device), [name for name in PARTS if name in asked]
    path = (args.out or FOLDER / machine.file_name(device)).resolve()

    def say(text: str) -> None:
        print(f"[{deadline - time.time():4.0f} s left] {text}", flush=True)

    build = "as it was" if args.no_build else build_extension(device, min(_BUILD_SECONDS, args.budget_s / 3))
    say(f"extension: {build}")
    begin(path, device, {"extension": build}, parts, 0.05 if args.smoke else 0.3, args.commit)
    if problem := Results.load(path).notes.get("extension problem"):
        say(f"the extension cannot be used, its rows will say so: {problem}")
    for part in parts:
        left = deadline - time.time() - _GRACE_SECONDS
        if left < 5:
            say(f"{part}: no time left")
            continue
        share = 1.0 if part == parts[-1] else PARTS[part].share
        options = Options(args.device, str(path), args.smoke, time.time() + share * left)
        processes = processes_of(part, device)
        say(f"{part}: {share * left:.0f} s" + (f", {processes} processes" if processes > 1 else ""))
        if processes > 1:
            supervise_together(part, options, say, processes)
        else:
            supervise(part, options, say)
    results = Results.load(path)
    results.notes.pop("done", None)
    results.save(path)
    say(str(path))
    print("\n".join(summary(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
