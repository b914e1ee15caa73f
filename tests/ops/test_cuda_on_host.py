"""The CUDA operators compute what they should: csrc/cuda, compiled as C++ and run on the processor by cuda_on_host/.

The launchers and kernels pass the tests of the CPU operators in whose place they are put: parity, derivatives, layouts,
unaligned memory, determinism, compilation. This shows arithmetic and index arithmetic, not what only a GPU can: memory
spaces, races between blocks, speed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host.plugin import OPERATORS, build

from benchmarks.counts.offline import ROOT


@pytest.fixture(scope="module")
def compiler():
    name = os.environ.get("CXX", "g++")
    try:
        subprocess.run([name, "--version"], check=True, capture_output=True)
    except OSError:
        pytest.skip(f"there is no C++ compiler {name}")
    return name


def run_tests(module: Path, selection: str, **environment: str) -> None:
    files = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in OPERATORS]
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "ON_HOST_MODULE": str(module), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_on_host.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", selection, *files], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]


def test_operators_pass_their_tests(compiler, tmp_path):
    run_tests(build(compiler, tmp_path, sanitize=False), "cpp and not compile and not registration")


@pytest.mark.slow
def test_no_access_out_of_bounds_and_no_dependence_on_order(compiler, tmp_path):
    """What compute-sanitizer's memcheck and racecheck would look for: under AddressSanitizer, with unaligned accesses
    and overflowing signed numbers reported, few blocks that have to take more than one turn each, and the last thread
    of the last block first."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in libraries]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"{compiler} comes without its sanitizers")
    module = build(compiler, tmp_path, sanitize=True)
    preload = {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own leaks
    run_tests(module, "cpp", ON_HOST_MOST="3", ON_HOST_REVERSE="1", **preload)
