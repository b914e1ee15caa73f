"""A build of gdd_fast._C whose CPU operators are those of csrc/cuda, run by shim.h, and a pytest plugin that puts it
in the place of the real one: `pytest -p cuda_on_host.plugin`, with ON_HOST_MODULE in the environment."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils import cpp_extension

from gdd_fast.backend import chooser
from gdd_fast.extension_sources import digest
from gdd_fast.ops import resample2d

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OPERATORS = ("adam_ema", "resample2d")
HEADERS = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h")
TORCH_HEADERS = ("c10/cuda/CUDAException.h", "c10/cuda/CUDAGuard.h", "c10/cuda/CUDAStream.h")
SANITIZERS = ["-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]


def rewrite(text: str) -> str:
    """CUDA as C++: launches become calls, limits of the launchers may be lowered, large arguments are not copied."""
    text = re.sub(r"__launch_bounds__\([\w, ]+\)", "", text)
    kernels = re.findall(r"__global__[^;{]*?(\w+)\(.*?\n}\n", text, re.S)
    bodies = re.findall(r"__global__.*?\n}\n", text, re.S)
    synchronising = [name for name, body in zip(kernels, bodies, strict=True) if "__syncthreads" in body]

    def call(launch: re.Match) -> str:
        kernel, configuration, arguments = launch.groups()
        synchronises = str(kernel.partition("<")[0] in synchronising).lower()
        return f"on_host::launch({{{configuration}}}, {synchronises}, [&] {{ {kernel}({arguments}); }});"

    text = re.sub(r"(\w+(?:<[^;{}()]*>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", call, text, flags=re.S)
    text = re.sub(r"const __grid_constant__ ([\w<>]+) (\w+)", r"const \1& \2", text)
    return re.sub(r"\b(INT32_MAX|65535)\b", r"on_host::most(\1)", text)


def build(compiler: str, folder: Path, *, sanitize: bool) -> Path:
    """Compile all of it as one file, in some seconds; raises CalledProcessError with what the compiler said."""
    for path in (CSRC / "cuda").iterdir():
        target = folder / "cuda" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(rewrite(path.read_text()))
    for name in (*HEADERS, *TORCH_HEADERS):
        header = folder / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text('#include "shim.h"\n')
    (folder / "gdd_fast_sources.h").write_text(f'#define GDD_FAST_SOURCES "{digest(CSRC)}"\n')
    units = ["module.cpp", "adam_ema.cpp", *(f"cuda/{name}.cu" for name in OPERATORS)]
    includes = "".join(f'#include "{unit}"\n' for unit in units)
    (folder / "all.cpp").write_text(includes)
    facts = {"TORCH_VERSION": torch.__version__, "CUDA_VERSION": "", "CUDA_ARCHITECTURES": "host", "NVCC_FLAGS": ""}
    facts["CXX_FLAGS"] = " ".join(flags := ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fPIC", "-shared"])
    macros = [f'-DGDD_FAST_{name}="{value}"' for name, value in facts.items()]
    macros += ["-DGDD_FAST_WITH_CUDA", "-DGDD_FAST_CPU=cuda", "-DTORCH_EXTENSION_NAME=_C"]
    paths = [folder, HERE, CSRC, *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = [f"-L{cpp_extension.library_paths()[0]}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    module = folder / "_C.so"
    command = [compiler, *flags, *(SANITIZERS if sanitize else []), *macros, *(f"-I{path}" for path in paths)]
    command += [folder / "all.cpp", "-o", module, *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return module


def install(path: str) -> None:
    """Let `gdd_fast._C` be the module at `path`, in this process, and operators without one of their own have "cpp"."""
    spec = importlib.util.spec_from_file_location("gdd_fast._C", path)
    sys.modules["gdd_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["gdd_fast._C"])
    resample2d.OPERATOR = replace(resample2d.OPERATOR, fused=resample2d.OPERATOR.fused | {"cpp"})
    resample2d._choose = chooser(resample2d.OPERATOR)


if "ON_HOST_MODULE" in os.environ:
    install(os.environ["ON_HOST_MODULE"])
