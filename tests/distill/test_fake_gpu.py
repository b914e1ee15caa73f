"""What shows on a GPU without memory or kernels, by the tests of fake_gpu/ in a process whose PyTorch finds one.

Nothing in the steps of an iteration or in the one-step engine waits for it, and no convolution has its maps copied to
another memory format (without_waiting.py). cuDNN's fused convolution runs where it was measured to be faster
(by_cudnn.py).
"""

import os
import subprocess
import sys

import pytest
import torch
from fake_gpu.plugin import build

from benchmarks.counts.offline import ROOT


@pytest.mark.skipif(
    bool(torch.version.cuda or torch.version.hip or sys.platform != "linux"),
    reason="the device is one for a PyTorch for CPUs, on Linux: with a CUDA device of its own there are two",
)
def test_on_a_gpu_without_memory(tmp_path):
    compiler = os.environ.get("CXX", "g++").split()
    try:
        library = build(compiler, tmp_path)
    except FileNotFoundError:
        pytest.skip(f"there is no C++ compiler {compiler[0]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    environment.pop("PYTEST_ADDOPTS", None)
    options = ["-q", "-x", "-p", "fake_gpu.plugin", "-p", "no:cacheprovider"]
    files = [ROOT / "tests" / "fake_gpu" / name for name in ("without_waiting.py", "by_cudnn.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**environment, "FAKE_GPU": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]
