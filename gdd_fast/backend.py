"""Which implementation of an operator runs, and why.

Every operator has a definition in plain PyTorch ("torch") and some of three fused implementations:

    "triton"    kernels/<op>.py: CUDA tensors, and CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)
    "cuda"      csrc/cuda/<op>.cu in the extension gdd_fast._C: CUDA tensors
    "cpp"       csrc/cpu/<op>.cpp in the same extension: CPU tensors

A backend requested by name runs, or `BackendError` says why it cannot. "auto" takes the first of `PREFERENCE` that can
run here. `resolve` alone decides this; `resolve_all` asks it for every operator of a run (`--backend`). `python -m
gdd_fast.info` shows the results of both, with the reasons.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from gdd_fast.errors import BackendError
from gdd_fast.extension_sources import digest

Backend = Literal["auto", "torch", "triton", "cuda", "cpp"]

REBUILD = "run `pip install --no-build-isolation --no-deps -e .` in the checkout, or reinstall gdd_fast"

# By device type, best first; any other device runs the definition. On a GPU the Triton kernels come first: only they
# are tuned per architecture.
PREFERENCE: dict[str, tuple[Backend, ...]] = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpp", "torch")}


_ANYWHERE: tuple[Backend, ...] = ("torch",)


@dataclass(frozen=True)
class Operator:
    """What is known about an operator before it sees a tensor: its name and its fused implementations.

    "auto" skips those in `opt_in`, which are not known to be faster than the definition. Without `float64`, only the
    definition computes in that dtype.
    """

    name: str
    fused: frozenset[str]
    opt_in: frozenset[str] = frozenset()
    float64: bool = True


@functools.cache
def extension() -> ModuleType | None:
    """The compiled extension gdd_fast._C, with its operators registered, or None if it is not built.

    Raises BackendError if it is built but does not load, was built against another torch, or, in a checkout, from
    sources other than those in csrc/. Such a build is neither used nor silently ignored.
    """
    if find_spec("gdd_fast._C") is None:
        return None
    import torch

    try:
        module = importlib.import_module("gdd_fast._C")
    except ImportError as error:
        raise BackendError(
            f"gdd_fast._C is built but does not load with torch {torch.__version__}, "
            f"so it was probably built against another one: {error}. To rebuild, {REBUILD}."
        ) from error
    checkout = Path(__file__).resolve().parents[1]
    sources = digest(checkout / "csrc") if (checkout / "pyproject.toml").is_file() else None
    check_build(module.build_info(), torch.__version__, sources)
    return module


def check_build(info: dict[str, Any], torch_version: str, sources: str | None = None) -> None:
    """Raise BackendError if the extension described by `info` does not fit this torch, this Python or these sources.

    `sources`: the digest of the sources it should have been built from, if they are available.
    """
    # the local part (+cpu, +cu130) is not compared: a build without CUDA runs with any of them
    built = info["torch"].split("+")[0]
    if built != torch_version.split("+")[0]:
        raise BackendError(f"gdd_fast._C was built against torch {built}, but this is {torch_version}: {REBUILD}.")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if info["python"] != python:
        raise BackendError(f"gdd_fast._C was built for Python {info['python']}, but this is {python}: {REBUILD}.")
    if sources is not None and info["sources"] != sources:
        raise BackendError(f"gdd_fast._C is stale, built before csrc/ was last changed: {REBUILD}.")


def has_extension() -> bool:
    """Whether gdd_fast._C is built. Raises BackendError where `extension` does."""
    return extension() is not None


def obstacle(operator: Operator, backend: str, device: str) -> str | None:
    """Why `backend` cannot run `operator` on tensors of `device` ("cpu", "cuda", ...) here, or None if it can.

    Raises BackendError if the answer needs the extension and that does not load, or needs Triton's launch options
    (kernels/tuned.json) and these are damaged.
    """
    if backend == "torch":
        return None
    if backend not in operator.fused:
        return f"{operator.name} has no {backend} implementation"
    if backend == "triton":
        return _triton_obstacle(device)
    wanted = "cuda" if backend == "cuda" else "cpu"
    if device != wanted:
        return f"the {backend} implementation takes {wanted.upper()} tensors, not {device}"
    module = extension()
    if module is None:
        return f"the extension gdd_fast._C is not built for this Python: {REBUILD}"
    if backend == "cuda" and not module.build_info()["cuda"]:
        return "the extension gdd_fast._C was built without CUDA (see GDD_FAST_CUDA in setup.py)"
    return None


def _triton_obstacle(device: str) -> str | None:
    if "triton" not in sys.modules and find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        _check_launch_table()
        return None
    if device != "cpu":
        return f"the Triton kernels take CUDA tensors, not {device}"
    # Triton reads this variable too; asking triton itself would import it on machines that never use it
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return "Triton kernels run on CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    _check_launch_table()
    return None


@functools.cache
def _check_launch_table() -> None:
    """Raise BackendError if the launch options are damaged: silently skipping the kernels would be slow."""
    from gdd_fast.kernels import _launch, _tuned

    try:
        _launch.table()
    except _tuned.TableError as error:
        raise BackendError(
            f"{_launch.TABLE}: {error}. Correct the entry, or put back the file that came with gdd_fast."
        ) from error


def resolve(backend: Backend, operator: Operator, device: str) -> Backend:
    """The implementation that runs: `backend` itself, or for "auto" the first in PREFERENCE that can.

    Raises BackendError for an unknown name, a backend that cannot run here, or an extension that does not load.
    """
    if backend == "auto":
        candidates = (b for b in PREFERENCE.get(device, _ANYWHERE) if b not in operator.opt_in)
        return next(b for b in candidates if obstacle(operator, b, device) is None)
    if backend not in get_args(Backend):
        raise BackendError(f"{operator.name}: unknown backend {backend!r}; there are {', '.join(get_args(Backend))}")
    reason = obstacle(operator, backend, device)
    if reason is not None:
        raise BackendError(f"{operator.name}: backend {backend!r} cannot run here: {reason}")
    return backend


def chooser(operator: Operator) -> Callable[..., Backend]:
    """`choose(backend, device, double=False)`: how every operator decides, before it calls torch.ops with the result.

    `choose` is `resolve`, except that with "auto", float64 (`double`) runs the definition if the operator's other
    backends do not compute in it. torch.compile calls it while tracing and treats the result as a constant, as with
    torch.compiler.assume_constant_result, which would import the compiler and with it triton.
    """

    def choose(backend: Backend, device: str, double: bool = False) -> Backend:
        chosen = resolve(backend, operator, device)
        if chosen == "torch" or operator.float64 or not double:
            return chosen
        if backend == "auto":
            return "torch"
        raise BackendError(f"{operator.name}: backend {backend!r} does not compute in float64; use 'torch'")

    choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return choose


def resolve_all(backend: Backend, operators: Iterable[Operator], device: str) -> dict[str, Backend]:
    """The backend that each operator runs, by name, if one is chosen for all, as a command's `--backend` does.

    A backend requested by name applies to the operators that have it; the others run their definition.

    Raises BackendError if no operator has it, or where `resolve` raises it for one that does.
    """
    operators = sorted(set(operators), key=lambda operator: operator.name)
    named = backend in ("triton", "cuda", "cpp")
    if named and not any(backend in operator.fused for operator in operators):
        raise BackendError(f"backend {backend!r}: none of {', '.join(o.name for o in operators)} has it")
    return {o.name: resolve("torch" if named and backend not in o.fused else backend, o, device) for o in operators}


def summary(runs: Mapping[str, str]) -> str:
    """The result of `resolve_all` on one line, the definitions first."""
    backends = sorted(set(runs.values()), key=lambda backend: (backend != "torch", backend))
    return "; ".join(f"{b} for {', '.join(name for name in runs if runs[name] == b)}" for b in backends)
