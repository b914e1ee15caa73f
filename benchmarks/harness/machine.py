"""The machine a figure was taken on: what it is, what runs on it, and what it can do, measured on it."""

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.timing import measure

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "numpy", "torchvision", "timm", "diffusers", "apex", "xformers", "flash_attn")
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
            "instruction_sets": _instruction_sets(),
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
            "clock_mhz": _cpu_clock(),
        }
    return found


def rates(device: torch.device, *, seconds: float = 0.5) -> dict[str, float]:
    """What this machine reaches with one library call: bytes/s of a copy (read and written), FLOP/s of products.

    Keys: copy, fp32, bf16, and tf32 on a GPU. Random data: zeros run faster on some chips.
    """
    gpu = device.type == "cuda"
    found = {"copy": _copy_bandwidth(1 << 30 if gpu else 1 << 26, device, seconds)}
    size = 8192 if gpu else 1536
    kinds = [("fp32", torch.float32, "highest"), ("bf16", torch.bfloat16, "highest")]
    kinds += [("tf32", torch.float32, "high")] if gpu else []
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype, precision in kinds:
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
            found[name] = 2 * size**3 / _fastest(_product(a, b), device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _copy_bandwidth(size: int, device: torch.device, seconds: float) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, seconds)


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _fastest(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    timing, _ = measure(call, device, seconds=seconds)
    # a ceiling: the quick end of the distribution, not its middle
    return (timing.device or timing.wall)[0]


def device_name(device: torch.device) -> str:
    """As the maker calls it: "NVIDIA H200", "Intel(R) Xeon(R) Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0].strip() if names else platform.processor() or "cpu"


def file_name(device: torch.device) -> str:
    """The device's results file: "nvidia-h200.json", "intel-xeon-processor-2-threads.json"."""
    name = device_name(device) + (f" {torch.get_num_threads()} threads" if device.type == "cpu" else "")
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
    names = dict.fromkeys((q.replace(".", "_") for q in _GPU_QUERY), None)
    if shutil.which("nvidia-smi") is None:
        return names
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_QUERY)}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [v.strip() for v in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else names


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


def _instruction_sets() -> list[str]:
    """Those that decide how networks run, by the kernel's names; what `ONEDNN_MAX_CPU_ISA` hides is among them."""
    flags = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    found = set(flags[0].split()) if flags else set()
    return sorted(flag for flag in found if flag.startswith(_VECTOR_SETS))


def _cpu_clock() -> float | None:
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read("/proc/cpuinfo"), re.MULTILINE)]
    return max(clocks, default=None)


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
