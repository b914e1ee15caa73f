"""`python -m benchmarks.gpu_battery`: everything worth knowing of one GPU machine, in a given time.

    python -m benchmarks.gpu_battery                            build, check, then all the parts
    python -m benchmarks.gpu_battery --only ops,tune            some parts; rows of the others are kept
    python -m benchmarks.gpu_battery --device cpu --smoke       a dry run of every part, about a minute

Needs the checkout, torch and numpy; no pytest, and nothing is installed. Each part runs in a process of its own, with a
share of what is left of `--budget-s`, and saves after every row: what cuts it off costs the row in progress. A process
that dies (a fault in a kernel ends a CUDA process for good) is started again behind the case that killed it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.case import OUT_OF_MEMORY, Case, Effort, measure_case
from benchmarks.results import FOLDER, Results, Row

ROOT = Path(__file__).resolve().parents[1]
# Part -> its share of the time that is left when it starts, were all to be run; the last one gets what remains.
SHARES = {"correctness": 0.18, "inference": 0.25, "train": 0.35, "ops": 0.6, "pipelines": 0.5, "tune": 1.0}
_BUILD_SECONDS = 170
_GRACE_SECONDS = 25  # for the row in progress when a part's time is up
_RESTARTS = 4
_DIED = 3
_SECONDS = {"inference": 0.4, "train": 1.5, "ops": 0.12, "pipelines": 0.3}


@dataclass(frozen=True)
class Options:
    """What a part's process is told."""

    device: str
    out: str
    smoke: bool
    deadline: float
    """In seconds of time.time()."""

    def left(self) -> float:
        return self.deadline - time.time()


def cases_of(part: str, smoke: bool) -> list[Case]:
    """The cases of a part, the most important first; `smoke`: a few small ones."""
    from benchmarks.network_cases import generator_case, network_cases
    from benchmarks.operator_cases import operator_cases
    from benchmarks.pipeline_cases import pipeline_cases
    from benchmarks.training_cases import training_cases

    if part == "pipelines":
        return pipeline_cases(False)[:3] if smoke else pipeline_cases(True)
    if part == "correctness" and not smoke:
        # both directions cover a forward alone; bytes have no backward; a generator's peers are the engines
        operators = [c for c in operator_cases(True) if not c.group.endswith(" forward") or "to_uint8" in c.group]
        return [*operators, generator_case("ncsnpp-32", 16, torch.bfloat16)]
    if part in ("ops", "correctness"):
        cases = operator_cases(not smoke)
        return cases[:9] if smoke else [c for c in cases if part == "ops" or "forward+backward" in c.group]
    if part == "inference":
        cases = network_cases(not smoke)
        return cases[:1] + cases[2:] if smoke else cases  # one generator is enough
    return training_cases(not smoke, steps=("iteration",)) if smoke else training_cases(True)


def run_part(part: str, options: Options) -> int:
    """In a process of its own: measure the cases of `part` that the file has no rows of. Status `_DIED` on a fault."""
    device, path = torch.device(options.device), Path(options.out)
    results = Results.load(path)
    if part == "tune":
        from benchmarks.tune import tune

        tune(results, path, device, options.left, smoke=options.smoke)
        return 0
    effort = Effort(0.0) if part == "correctness" else Effort(0.02 if options.smoke else _SECONDS[part], least=3)
    checked = results.notes.setdefault("correctness", {"checked": 0, "failures": []})
    done = set(results.notes.setdefault("done", {}).setdefault(part, []))
    for case in cases_of(part, options.smoke):
        if str(case) in done:
            continue
        if options.left() <= 0:
            results.notes.setdefault("cut_off", {})[part] = str(case)
            break
        results.notes["running"] = [part, case.group, case.name]
        results.save(path)
        for row in measure_case(case, device, effort, stop=lambda: options.left() <= 0):
            print(f"{row.group} | {row.case} | {row.peer}: {row.failure or f'{row.seconds * 1e3:.4g} ms'}", flush=True)
            if part == "correctness":
                checked["failures"].append(f"{case}: {row.peer}: {row.failure}")
            else:
                results.add([row])
                results.save(path)
            if row.failure and row.failure != OUT_OF_MEMORY and not _alive(device):
                _finish(results, path, part, case)
                return _DIED
        checked["checked"] += part == "correctness"
        _finish(results, path, part, case)
    results.save(path)
    return 0


def _finish(results: Results, path: Path, part: str, case: Case) -> None:
    results.notes["done"][part].append(str(case))
    results.notes.pop("running", None)
    results.save(path)


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: after a fault in a kernel, nothing does in this process."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


def supervise(part: str, options: Options, say: Callable[[str], None]) -> None:
    """Run a part in processes of its own until it is through, out of time, or has died too often."""
    path = Path(options.out)
    for attempt in range(_RESTARTS):
        command = [sys.executable, "-m", "benchmarks.gpu_battery", "--part", part, json.dumps(asdict(options))]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=max(options.left(), 0) + _GRACE_SECONDS).returncode
        except subprocess.TimeoutExpired:
            status = "still busy when its time was up"
        results = Results.load(path)
        running = results.notes.pop("running", None)
        if status == 0:
            return
        say(f"{part}: process ended with {status} at {running}")
        results.notes.setdefault("died", []).append([part, str(status), running])
        if running is not None:  # a hard crash left no row; the next process goes on behind this case
            case = Case(*running[1:], build=_unbuildable)
            results.add([Row(*running[1:], "-", failure=f"the process ended with status {status}")])
            results.notes.setdefault("done", {}).setdefault(part, []).append(str(case))
        results.save(path)
        if options.left() < 5:
            return
        say(f"{part}: started again, {attempt + 1}")


def _unbuildable(device: torch.device) -> None:
    raise RuntimeError("only a name")


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
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not built: still busy after {seconds:.0f} s"
    if done.returncode:
        return "not built: " + " / ".join((done.stderr or done.stdout).strip().splitlines()[-8:])[:2000]
    return f"built {'with' if cuda else 'without'} CUDA in {time.time() - start:.0f} s"


def begin(
    path: Path, device: torch.device, notes: dict[str, str], fresh: Iterable[str], seconds: float, commit: str | None
) -> None:
    """The file a battery fills: the machine and its rates anew; rows of parts that are not `fresh` are kept."""
    described = machine.describe(device)
    described["commit"] = commit or described["commit"]
    if "error" in (described["extension"] or {}):
        notes = {**notes, "extension problem": described["extension"]["error"]}
    results = Results.continued(path, described, machine.rates(device, seconds=seconds))
    for key in ("running", "cut_off", "died", "extension problem"):
        results.notes.pop(key, None)
    for part in fresh:
        results.notes.get("done", {}).pop(part, None)
    results.notes |= notes
    results.save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_battery", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default=",".join(SHARES), help=f"parts, of {','.join(SHARES)}")
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
    parts = args.only.split(",")
    if set(parts) - set(SHARES):
        parser.error(f"--only takes {', '.join(SHARES)}, not {args.only}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU can be used here; --device cpu --smoke is the dry run")
    device = torch.device(args.device)
    path = (args.out or FOLDER / machine.file_name(device)).resolve()

    def say(text: str) -> None:
        print(f"[{deadline - time.time():4.0f} s left] {text}", flush=True)

    build = "as it was" if args.no_build else build_extension(device, min(_BUILD_SECONDS, args.budget_s / 3))
    say(f"extension: {build}")
    begin(path, device, {"extension": build}, parts, 0.05 if args.smoke else 0.3, args.commit)
    if problem := Results.load(path).notes.get("extension problem"):
        say(f"the extension cannot be used, its rows will say so: {problem}")
    for part in [p for p in SHARES if p in parts]:
        left = deadline - time.time() - _GRACE_SECONDS
        if left < 5:
            say(f"{part}: no time left")
            continue
        last = part == [p for p in SHARES if p in parts][-1]
        share = 1.0 if last else SHARES[part]
        options = Options(args.device, str(path), args.smoke, time.time() + share * left)
        say(f"{part}: {share * left:.0f} s")
        supervise(part, options, say)
    results = Results.load(path)
    results.notes.pop("done", None)
    results.save(path)
    failed = [row for row in results.rows if row.failure]
    say(f"{len(results.rows)} rows, {len(failed)} of them without a time; {path}")
    for row in failed:
        print(f"  {row.group} | {row.case} | {row.peer}: {row.failure}")
    for failure in results.notes.get("correctness", {}).get("failures", []):
        print(f"  correctness: {failure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
