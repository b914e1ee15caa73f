"""The machine a figure was taken on: what it is, what runs on it, and what it can do, measured on it."""

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.timing import measure

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = [
    "torch",
    "triton",
    "numpy",
    "torchvision",
    "timm",
    "diffusers",
    "apex",
    "xformers",
    "flash_attn",
    "nvidia-cudnn-frontend",
]
# Records and pages made of them are no part of what they tell of.
_WRITTEN_BY_RUNS = (":(exclude,top)benchmarks/results", ":(exclude,top)docs", ":(exclude,top)README.md")
_VECTOR_SETS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")
_GPU_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def describe(device: torch.device) -> dict[str, Any]:
    """Name, clocks, driver, versions and commit; strings and numbers, None for what cannot be found out here."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "type": device.type,
        "cores": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "extension": _extension(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
            **_nvidia_smi(device),
        }
    else:
        found |= {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            # those that decide how networks run, by the kernel's names, ONEDNN_MAX_CPU_ISA or not
            "instruction_sets": sorted(flag for flag in _cpu_flags() if flag.startswith(_VECTOR_SETS)),
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
            "clock_mhz": max(map(float, _cpu_lines("cpu MHz")), default=None),
            "load": round(os.getloadavg()[0], 1),
        }
    return found


def rates(device: torch.device, *, seconds: float = 0.5) -> dict[str, float]:
    """What this machine reaches with one library call: bytes/s of a copy (read and written), FLOP/s of products.

    Keys: copy, fp32, bf16, and tf32 on a GPU. Random data: zeros run faster on some chips.
    """
    gpu = device.type == "cuda"
    source = torch.empty(1 << 30 if gpu else 1 << 26, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / _fastest(partial(target.copy_, source), device, seconds)}
    del source, target
    size = 8192 if gpu else 1536
    kinds = [("fp32", torch.float32, "highest"), ("bf16", torch.bfloat16, "highest")]
    kinds += [("tf32", torch.float32, "high")] if gpu else []
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype, precision in kinds:
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
            product = partial(torch.mm, a, b, out=torch.empty_like(a))
            found[name] = 2 * size**3 / _fastest(product, device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _fastest(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    timing, _ = measure(call, device, seconds=seconds)
    # a ceiling: the quick end of the distribution, not its middle
    return (timing.device or timing.wall)[0]


def device_name(device: torch.device) -> str:
    """As the maker calls it: "NVIDIA H200", "Intel(R) Xeon(R) Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next(iter(_cpu_lines("model name")), platform.processor() or "cpu")


def file_name(device: torch.device) -> str:
    """The device's results file: "nvidia-h200.json", "intel-xeon-processor-2-threads.json". A processor that imitates
    an older one has another, "amd-epyc-avx2-2-threads.json".
    """
    older = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    name = device_name(device) + (f" {older} {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    return slug(name) + ".json"


def slug(name: str) -> str:
    """For file names: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str | None:
    """The checkout's commit, with "+" if what is measured differs from it; None outside a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", *_WRITTEN_BY_RUNS]
    changed = subprocess.run(status, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _nvidia_smi(device: torch.device) -> dict[str, str | None]:
    values: list[str] = []
    if shutil.which("nvidia-smi") is not None:
        query = (f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader", f"--id={device.index or 0}")
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True)
        values = [] if done.returncode else [v.strip() for v in done.stdout.strip().split(",")]
    found = values if len(values) == len(_GPU_QUERY) else [None] * len(_GPU_QUERY)
    return {name.replace(".", "_"): value for name, value in zip(_GPU_QUERY, found, strict=True)}


def _extension() -> dict[str, Any] | None:
    """How the extension was built; None without one; `{"error": ...}` for one that cannot be used."""
    from gdd_fast.backend import extension
    from gdd_fast.errors import GddFastError

    try:
        module = extension()
    except (GddFastError, ImportError, OSError) as error:  # stale or of another torch: what does not need it still runs
        return {"error": f"{type(error).__name__}: {error}"}
    return None if module is None else dict(module.build_info())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    return set(" ".join(_cpu_lines("flags")[:1] or _cpu_lines("Features")[:1]).split())


def _cpu_lines(name: str) -> list[str]:
    """What /proc/cpuinfo says, one entry for each processor."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return re.findall(rf"^{name}\s*:\s*(.*\S)", text, re.MULTILINE)
