"""However gdd_fast is obtained, it imports, finds its kernels and its data, and drags no other package in.

Everything happens in a copy of the checkout and in throw-away environments that borrow the installed requirements from
the running one; nothing is fetched.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import gdd_fast

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("gdd_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
PURE_PYTHON = {"GDD_FAST_EXT": "0"}

# Run where nothing but an installation can be imported from; the argument is "yes" if the extension should be there.
PROBE = """
import sys, importlib.metadata, importlib.util as util
from importlib.resources import files
from pathlib import Path
import gdd_fast
import gdd_fast.kernels

spec = util.find_spec("gdd_fast.kernels.residual")
assert spec, "no kernels"
assert Path(spec.origin).with_name("tuned.json").is_file(), "no launch configurations"
if util.find_spec("triton"):
    import torch
    from gdd_fast.kernels import residual as kernels
    assert kernels.configuration("residual", torch.device("cpu"), (1, 4, 16))["elements"]
PACKAGED = ("assets", "data/assets", "report/assets", "webpage/assets", "py.typed")
for name in (f"gdd_fast/{kept}" for kept in PACKAGED):
    expected = Path(sys.argv[1], name)
    found = files("gdd_fast").joinpath(name.partition("/")[2])
    missing = {p.name for p in expected.rglob("*")} - {p.name for p in Path(str(found)).rglob("*")}
    assert not missing and (found.is_file() or found.is_dir() or not expected.exists()), f"missing of {name}: {missing}"
import torch
from gdd_fast.backend import has_extension
from gdd_fast.ops.residual import residual
assert has_extension() == (sys.argv[2] == "yes"), "extension"
x = torch.randn(1, 3, 4, 4)
assert torch.equal(residual(x, x), x + x)
print(gdd_fast.__version__, Path(gdd_fast.__file__).parent)
"""


def run(*command, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GDD_FAST_EXT", "GDD_FAST_CUDA")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(python: str | Path, cwd: Path, extension: bool = False, **variables: str) -> Path:
    """The folder gdd_fast is imported from."""
    _, folder = run(python, "-c", PROBE, ROOT, "yes" if extension else "no", cwd=cwd, **variables).split(maxsplit=1)
    return Path(folder.strip())


def copy_checkout(to: Path) -> Path:
    to.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=LEFT_BEHIND)
        else:
            shutil.copy(source, to / name)
    return to


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new virtual environment: it sees the requirements of the running one, but not its gdd_fast."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # a path in a .pth file is searched, but the .pth files in it (an editable gdd_fast) are not read
    Path(purelib, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str | Path, cwd: Path, **variables: str) -> None:
    options = ("--no-build-isolation", "--no-deps", "--ignore-installed", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd, **variables)


def test_uninstalled_checkout(checkout, environment, tmp_path):
    assert probe(environment, tmp_path, PYTHONPATH=str(checkout)) == checkout / "gdd_fast"


def test_sdist_and_the_wheel_made_of_it(checkout, environment, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", checkout, cwd=tmp_path, **PURE_PYTHON)
    (sdist,), (wheel,) = ((checkout / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")

    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert probe(environment, tmp_path, PYTHONPATH=str(unpacked)) == unpacked / "gdd_fast"
    shipped = {path.relative_to(checkout) for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert shipped == {p.relative_to(unpacked) for p in (unpacked / "csrc").rglob("*") if p.is_file()}

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gdd_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    install(environment, wheel, cwd=tmp_path)
    assert probe(environment, tmp_path).is_relative_to(environment.parents[1])


def test_one_version_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text().split("\n## ", 2)[1]
    version, dash, date = changes.partition("\n")[0].split()
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert version == gdd_fast.__version__ and dash == "-"
    assert f"version: {version}" in citation and f"date-released: {date}" in citation


@pytest.mark.parametrize("mode", ["default", "strict", pytest.param("compat", marks=pytest.mark.slow)])
def test_editable(mode, checkout, environment, tmp_path):
    settings = () if mode == "default" else ("--config-settings", f"editable_mode={mode}")
    install(environment, *settings, "--editable", checkout, cwd=tmp_path, **PURE_PYTHON)
    folder = probe(environment, tmp_path)
    assert folder.resolve().is_relative_to(checkout)


@pytest.mark.slow
def test_wheel_with_the_extension(checkout, environment, tmp_path):
    install(environment, checkout, cwd=tmp_path, GDD_FAST_EXT="1", GDD_FAST_CUDA="0")
    probe(environment, tmp_path, extension=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GDD_FAST_EXT": "maybe"}, "error: GDD_FAST_EXT='maybe': use one of auto, 0, 1"),
        ({"GDD_FAST_CUDA": "yes"}, "error: GDD_FAST_CUDA='yes': use one of auto, 0, 1"),
        ({"GDD_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "error: GDD_FAST_CUDA=1, but"),
    ],
    ids=["extension", "cuda", "cuda insisted on"],
)
def test_a_switch_that_cannot_be_obeyed_is_refused(variables, message):
    environment = {**os.environ, "GDD_FAST_EXT": "1", **variables}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_toolkit_is_found_behind_a_script_called_nvcc(tmp_path):
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    script.chmod(0o755)
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')['find_toolkit']()\n"
        "import os; print(os.environ['CUDA_HOME'])"
    )
    path = f"{script.parent}:{os.environ['PATH']}"
    out = run(sys.executable, "-c", code, cwd=ROOT, GDD_FAST_EXT="0", CUDA_HOME="", CUDA_PATH="", PATH=path)
    home = Path(out.split()[-1])
    assert (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file()


def test_metadata_needs_no_torch_and_the_build_says_that_it_does(checkout):
    without_torch = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; "
    code = without_torch + "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    run(sys.executable, "-c", code, "sdist", cwd=checkout, GDD_FAST_EXT="1")
    done = subprocess.run(
        [sys.executable, "-c", code, "build_ext"],
        cwd=checkout,
        env={**os.environ, "GDD_FAST_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "--no-build-isolation" in done.stderr
