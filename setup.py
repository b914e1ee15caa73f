"""Build gdd_fast: the Python package, its Triton kernels, and the compiled extension gdd_fast._C.

    pip install --no-build-isolation -e .     # the usual way; the extension is built against the torch you have

Switches, all read here and nowhere else:

    GDD_FAST_EXT=auto|0|1     auto: build the extension where there are a C++ compiler and Python's headers;
                              0: pure Python (PyTorch and Triton implementations only); 1: insist
    GDD_FAST_CUDA=auto|0|1    auto: CUDA operators where nvcc and torch are of one CUDA major version; 1: insist
    TORCH_CUDA_ARCH_LIST      GPU architectures, by default "8.0;9.0+PTX"; no GPU is needed to build
    GDD_FAST_DEBUG=0|1        1: no optimisation, debug symbols
    MAX_JOBS                  how many compilers run at once

The kernels live in top-level folders; their installed names are gdd_fast.kernels and gdd_fast._C.
"""

import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
sources_digest = runpy.run_path(str(ROOT / "gdd_fast" / "extension_sources.py"))["digest"]


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"error: {name}={value!r}: use one of {', '.join(allowed)}")
    return value


def sources(*patterns: str) -> list[str]:
    """Paths relative to setup.py: setuptools rejects absolute ones."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension_obstacle() -> str | None:
    """Why the extension cannot be built on this machine, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++")):
        return "no C++ compiler was found (install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h was not found (install your Python's development files, for example python3-dev)"
    return None


def find_toolkit() -> None:
    """Set CUDA_HOME, if it is not set, to the toolkit of the nvcc on the PATH.

    torch takes the folder above that nvcc's for it, which is wrong where nvcc is a link or a script that calls the real
    one: then compiling works and linking does not find the runtime library. nvcc itself knows where it lives.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    steps = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


def cuda_obstacle() -> str | None:
    """Why the CUDA operators cannot be built, or None. A GPU is not asked for: wheels are built without one."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    find_toolkit()
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return "nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)"
    text = subprocess.run([Path(CUDA_HOME, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", text)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {found[1] if found else '?'} and torch is CUDA {torch.version.cuda}"
    with tempfile.TemporaryDirectory() as folder:
        libraries = [f"-L{CUDA_HOME}/lib64", f"-L{CUDA_HOME}/lib", "-lcudart"]
        compiler = os.environ.get("CXX", "c++").split()
        command = [*compiler, "-shared", "-x", "c++", os.devnull, *libraries, "-o", f"{folder}/empty.so"]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return f"the linker finds no libcudart.so in {CUDA_HOME} (set CUDA_HOME to the whole CUDA toolkit)"
    return None


def decide(name: str, setting: str, obstacle: str | None) -> bool:
    """Resolve an auto|0|1 switch: 1 raises if there is an obstacle, auto says that there is one."""
    if setting == "0":
        return False
    if obstacle is not None:
        if setting == "1":
            raise SystemExit(f"error: {name}=1, but {obstacle}")
        print(f"gdd_fast: {name}=auto resolves to 0: {obstacle}")
    return obstacle is None


def openmp() -> list[str]:
    """The flag without which at::parallel_for runs on one thread.

    It is given to the compiler and not to the linker, so that threads come from the GNU OpenMP library that torch has
    brought along, and not from a second one. Clang's calls that library does not answer.
    """
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    if "clang" in subprocess.run(command, capture_output=True, text=True).stdout.lower():
        print("gdd_fast: clang: the CPU operators run on one thread each; build with g++ for more")
        return []
    return ["-fopenmp"]


class TorchIsMissing(build_ext):
    """Stands in for torch's build_ext, so that an sdist and the metadata can be made without torch."""

    def run(self) -> None:
        raise SystemExit(
            "error: gdd_fast._C is built against the torch of your environment. Install torch first and pass "
            "--no-build-isolation to pip, or set GDD_FAST_EXT=0 for a pure Python install."
        )


def extension() -> dict:
    """setup()'s arguments for gdd_fast._C: C++ operators from csrc/*.cpp and csrc/cpu/, CUDA ones from csrc/cuda/."""
    cxx_sources = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    cuda_setting = switch("GDD_FAST_CUDA", "auto", ("auto", "0", "1"))
    try:
        import torch
    except ModuleNotFoundError:
        return {"ext_modules": [Extension("gdd_fast._C", cxx_sources)], "cmdclass": {"build_ext": TorchIsMissing}}
    with_cuda = decide("GDD_FAST_CUDA", cuda_setting, cuda_obstacle())
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Tells the build what it is made of, in a header of its own, so that a change recompiles one file more."""

        def build_extensions(self) -> None:
            header = Path(self.build_temp, "gdd_fast_sources.h").resolve()
            text = f'#define GDD_FAST_SOURCES "{sources_digest(ROOT / "csrc")}"\n'
            if not header.is_file() or header.read_text() != text:
                header.parent.mkdir(parents=True, exist_ok=True)
                header.write_text(text)
            for module in self.extensions:
                module.include_dirs.append(str(header.parent))
                module.depends.append(str(header))
            super().build_extensions()

    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES) if with_cuda else ""
    optimise = ["-O0", "-g"] if switch("GDD_FAST_DEBUG", "0", ("0", "1")) == "1" else ["-O3", "-g0"]
    # a fused multiply-add rounds once where torch's own kernels round twice: results would differ in the last bit
    # said here, as torch adds its own standard where none is, and up to 2.11 that is C++17
    standard = "-std=c++20"
    cxx_flags = [standard, *optimise, "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", *openmp()]
    nvcc_flags = [standard, optimise[0], "-lineinfo", "--threads=2"] if with_cuda else []
    facts = {
        "GDD_FAST_TORCH_VERSION": torch.__version__,
        "GDD_FAST_CUDA_VERSION": torch.version.cuda if with_cuda else "",
        "GDD_FAST_CUDA_ARCHITECTURES": architectures,
        "GDD_FAST_CXX_FLAGS": " ".join(cxx_flags),
        "GDD_FAST_NVCC_FLAGS": " ".join(nvcc_flags),
    }
    module = (CUDAExtension if with_cuda else CppExtension)(
        "gdd_fast._C",
        cxx_sources + (sources("csrc/cuda/*.cu") if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()]
        + ([("GDD_FAST_WITH_CUDA", None)] if with_cuda else []),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


build_extension = decide("GDD_FAST_EXT", switch("GDD_FAST_EXT", "auto", ("auto", "0", "1")), extension_obstacle())

setup(
    packages=[*find_packages(include=["gdd_fast", "gdd_fast.*"]), "gdd_fast.kernels"],
    package_dir={"gdd_fast.kernels": "kernels"},
    package_data={
        "gdd_fast": ["py.typed", "assets/**/*", "data/assets/**/*", "report/assets/*", "webpage/assets/*"],
        "gdd_fast.kernels": ["*.json"],
    },
    **(extension() if build_extension else {}),
)
