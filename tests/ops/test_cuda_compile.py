"""Every CUDA kernel compiles for sm_80 and sm_90 with nvcc alone and without spilling registers."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.counts.offline import ARCHITECTURES, ROOT, Resources, parse_report

CUDA_TYPES = ("float", "double", "__half", "__nv_bfloat16")

# What to instantiate of each header; a header missing here fails test_every_header_is_listed.
INSTANTIATIONS = {
    "resample2d.cuh": [
        f"template cudaError_t launch_resample2d<{t}>(const {t}*, const Real<{t}>*, const {t}*, {t}*, "
        "const Resample&, cudaStream_t);"
        for t in CUDA_TYPES
    ],
    "adam_ema.cuh": [
        "auto* const launcher = &launch_adam_ema;",
    ],
    "floats.cuh": [],  # no kernels: included by the others
}


def compile_cuda(source: str, architecture: int) -> list[Resources]:
    """Resources of every kernel that `source` (CUDA text that includes from csrc/) instantiates, by nvcc alone."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "source.cu")
        path.write_text(source)
        includes = [f"-I{p}" for p in (ROOT / "csrc",)]
        command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", *includes]
        done = subprocess.run([*command, "-o", Path(folder, "out.cubin"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    return [Resources(n, architecture, *report) for n, report in zip(names, parse_report(done.stderr), strict=True)]


def test_every_header_is_listed():
    assert {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cuh")} == INSTANTIATIONS.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("header", [header for header, kernels in INSTANTIATIONS.items() if kernels])
def test_kernels_compile_without_spills(header, architecture):
    body = "\n".join(INSTANTIATIONS[header])
    kernels = compile_cuda(f'#include "cuda/{header}"\nnamespace gdd_fast::cuda {{\n{body}\n}}\n', architecture)
    assert kernels
    for resources in kernels:
        resources.assert_no_spills()


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_launchers_compile_against_torch(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    torch_include = Path(torch.__file__).parent / "include"
    includes = [ROOT / "csrc", torch_include, torch_include / "torch" / "csrc" / "api" / "include"]
    if not (torch_include / "c10" / "cuda" / "CUDAStream.h").is_file():
        pytest.skip("this torch comes without the headers of c10/cuda")
    if not (torch_include / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h").is_file():
        # the one header of c10/cuda that a torch without CUDA leaves out says only whether libraries are shared
        generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
        generated.parent.mkdir(parents=True)
        generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
        includes.append(tmp_path)
    command = ["nvcc", "-std=c++20", "-c", ROOT / "csrc" / "cuda" / source, "-o", tmp_path / "out.o"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["--expt-relaxed-constexpr", "-DGDD_FAST_WITH_CUDA", *(f"-I{path}" for path in includes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
