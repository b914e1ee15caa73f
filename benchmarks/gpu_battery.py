"""`python -m benchmarks.gpu_battery`: everything worth knowing of one GPU machine, in a given time.

    python -m benchmarks.gpu_battery                            build, check, then all the parts but "compiled"
    python -m benchmarks.gpu_battery --only tune,compiled       some parts; rows of the others are kept
    python -m benchmarks.gpu_battery --device cpu --smoke       a dry run of every part, about a minute

Needs the checkout, torch and numpy; no pytest, and nothing is installed or fetched. Each part (battery_parts.py) runs
in a process of its own, the first in several at once, with a share of what is left of `--budget-s`, and saves after
every row: what cuts it off costs the row in progress. A process that dies (a fault in a kernel ends a CUDA process for
good) is started again behind the case that killed it. What failed is listed at the end by operator, shape, peer, error.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.battery_parts import DEFAULT, PARTS, PROCESS_BYTES, cases_of
from benchmarks.harness import machine
from benchmarks.harness.case import OUT_OF_MEMORY, Effort, Outcome, computes, measure_case, release
from benchmarks.harness.results import FOLDER, Results, Row

ROOT = Path(__file__).resolve().parents[1]
_BUILD_SECONDS = 170
_GRACE_SECONDS = 25  # for the row in progress when a part's time is up
_RESTARTS = 4
_DIED = 3
_END_SECONDS = 5  # for a build to end by itself
_LATE = "still busy when its time was up"


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
    checked = _checked(results)
    done = set(results.notes.setdefault("done", {}).setdefault(part, []))
    not_begun: list[str] = []
    for number, case in enumerate(cases_of(part, options.smoke)):
        if number in done or not options.take(number):
            continue
        if options.left() <= 0:
            not_begun.append(str(case))
            continue
        results.notes["running"] = [part, number, case.group, case.name]
        results.save(path)
        outcome = Outcome()
        for row in measure_case(case, device, effort, stop=lambda: options.left() <= 0, outcome=outcome):
            print(f"{row.group} | {row.case} | {row.peer}: {row.failure or f'{row.seconds * 1e3:.4g} ms'}", flush=True)
            if part == "correctness":
                checked["failures"].append(_describe(row))
            else:
                results.add([row])
            results.save(path)
            if row.failure and row.failure != OUT_OF_MEMORY and not computes(device):
                _finish(results, path, part, number)
                return _DIED
        if part == "correctness":
            _count(checked, outcome)
        if outcome.not_begun:
            _cut_off(results, part, f"{case} before {', '.join(outcome.not_begun)}")
        _finish(results, path, part, number)
    if not_begun:
        more = f" and {len(not_begun) - 1} more" if len(not_begun) > 1 else ""
        _cut_off(results, part, not_begun[0] + more)
    results.save(path)
    return 0


def _checked(results: Results) -> dict[str, Any]:
    """What the record says of correctness: how many cases were checked to the end, and of each peer in how many.

    `missing` has the peers that could not run, with the number of cases and the reason of the last one.
    """
    empty = {"checked": 0, "failures": [], "right": {}, "missing": {}}
    found = results.notes.setdefault("correctness", {})
    for name, value in empty.items():
        found.setdefault(name, value)
    return found


def _count(checked: dict[str, Any], outcome: Outcome) -> None:
    checked["checked"] += not outcome.not_begun
    for peer in outcome.right:
        checked["right"][peer] = checked["right"].get(peer, 0) + 1
    for peer, reason in outcome.missing.items():
        cases, _ = checked["missing"].get(peer, (0, ""))
        checked["missing"][peer] = [cases + 1, reason]


def _cut_off(results: Results, part: str, what: str) -> None:
    results.notes.setdefault("cut_off", {}).setdefault(part, []).append(what)


def _describe(row: Row) -> str:
    return f"{row.group} | {row.case} | {row.peer}: {row.failure}"


def _finish(results: Results, path: Path, part: str, number: int) -> None:
    results.notes["done"][part].append(number)
    results.notes.pop("running", None)
    results.save(path)


def supervise(part: str, options: Options, say: Callable[[str], None]) -> None:
    """Run a part in processes of its own until it is through, out of time, or has died too often."""
    path = Path(options.out)
    for attempt in range(_RESTARTS):
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
            _cut_off(results, part, " | ".join(running[2:]))
        else:
            results.notes.setdefault("died", []).append([part, str(status), running])
        if status not in (_LATE, _DIED) and running is not None:  # a crash left no row
            row = Row(*running[2:], "-", failure=f"the process ended with status {status}")
            if part == "correctness":
                _checked(results)["failures"].append(_describe(row))
            else:
                results.add([row])
            results.notes["done"][part].append(running[1])
        results.save(path)
        if running is None and status != _DIED and part != "tune":  # it would end in the same way again
            return
        if options.left() < 5:
            return
        say(f"{part}: started again, {attempt + 1}")


def supervise_together(part: str, options: Options, say: Callable[[str], None], processes: int) -> None:
    """`supervise` for so many processes at once, each with a file of its own; the next case is whose that is free."""
    path = Path(options.out)
    base = Results.load(path)
    with tempfile.TemporaryDirectory() as taken:
        own = [replace(options, out=str(_part_file(path, part, i)), taken=taken) for i in range(processes)]
        for one in own:
            Results(base.machine, base.rates).save(Path(one.out))
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(lambda one: supervise(part, one, say), own))
    for one in own:
        take_findings(base, Results.load(Path(one.out)))
    base.save(path)
    for one in own:
        Path(one.out).unlink()


def _part_file(path: Path, part: str, number: int | str) -> Path:
    return path.with_name(f".{path.stem}.{part}.{number}.json")


def take_findings(into: Results, found: Results) -> None:
    """Rows of `found`, and its notes on what was checked, cut off and died; a case still running was cut off."""
    into.add(found.rows)
    checked, own = _checked(into), _checked(found)
    checked["checked"] += own["checked"]
    checked["failures"] += own["failures"]
    for peer, cases in own["right"].items():
        checked["right"][peer] = checked["right"].get(peer, 0) + cases
    for peer, (cases, reason) in own["missing"].items():
        checked["missing"][peer] = [checked["missing"].get(peer, (0, ""))[0] + cases, reason]
    for part, cases in found.notes.get("cut_off", {}).items():
        into.notes.setdefault("cut_off", {}).setdefault(part, []).extend(cases)
    if "running" in found.notes:
        part, _, *case = found.notes["running"]
        _cut_off(into, part, " | ".join(case))
    if "died" in found.notes:
        into.notes.setdefault("died", []).extend(found.notes["died"])


def take_left_over(results: Results, path: Path, fresh: Iterable[str]) -> list[Path]:
    """Take up what processes of an earlier run wrote that was ended before it could; the files, to be removed.

    What parts that are `fresh` left is dropped, and what is of another device.
    """
    files = [(part, found) for part in PARTS for found in sorted(path.parent.glob(_part_file(path, part, "*").name))]
    for part, file in files:
        found = Results.load(file)
        if part not in fresh and found.machine["device"] == results.machine["device"]:
            take_findings(results, found)
    return [file for _, file in files]


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
    fresh = set(fresh)
    rates = machine.rates(device, seconds=seconds)
    described = machine.describe(device)  # behind them, while the clocks are still up
    described["commit"] = commit or described["commit"]
    if "error" in (described["extension"] or {}):
        notes = {**notes, "extension problem": described["extension"]["error"]}
    release(device)  # other processes will want the memory
    results = Results.continued(path, described, rates)
    if "running" in results.notes:  # an earlier run was ended from outside
        part, _, *case = results.notes["running"]
        _cut_off(results, part, " | ".join(case))
    stale = ["running", "done", "extension problem"]
    stale += [note for note, part in (("correctness", "correctness"), ("tuning", "tune")) if part in fresh]
    for key in stale:
        results.notes.pop(key, None)
    left_over = take_left_over(results, path, fresh)
    cut_off, died = results.notes.get("cut_off", {}), results.notes.get("died", [])
    results.notes["cut_off"] = {part: cases for part, cases in cut_off.items() if part not in fresh}
    results.notes["died"] = [one for one in died if one[0] not in fresh]
    results.notes |= notes
    results.save(path)
    for file in left_over:
        file.unlink()


def summary(results: Results) -> list[str]:
    """What did not come out, a line each, and how much did."""
    notes, failed = results.notes, [row for row in results.rows if row.failure]
    checked = _checked(results)
    lines = [f"{len(results.rows)} rows, {len(failed)} of them without a time"]
    lines += [f"  {_describe(row)}" for row in failed]
    lines.append(f"correctness: {checked['checked']} cases checked, {len(checked['failures'])} failures")
    lines += [f"  {failure}" for failure in checked["failures"]]
    if checked["right"]:
        lines.append("  right: " + ", ".join(f"{peer} in {cases}" for peer, cases in checked["right"].items()))
    lines += [f"  {peer} not checked in {n} cases: {reason}" for peer, (n, reason) in checked["missing"].items()]
    lines += [f"{part}: out of time at {case}" for part, cases in notes.get("cut_off", {}).items() for case in cases]
    lines += [f"{part}: died with status {status} at {running}" for part, status, running in notes.get("died", [])]
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
