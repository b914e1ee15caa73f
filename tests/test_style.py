"""The tree is formatted and free of lint, by the tools and settings `make lint` uses."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = sorted(path for suffix in ("cpp", "h", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))


def passes(*command) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_python(arguments):
    pytest.importorskip("ruff")
    passes(sys.executable, "-m", "ruff", *arguments, "--no-cache", ".")


def test_types():
    pytest.importorskip("mypy")
    passes(sys.executable, "-m", "mypy")


def test_cxx_and_cuda():
    pytest.importorskip("clang_format")
    tool = Path(sysconfig.get_path("scripts"), "clang-format")
    passes(tool, "--dry-run", "--Werror", *CXX)
