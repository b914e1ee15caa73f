"""A pytest plugin that gives PyTorch a CUDA device without memory or kernels, for fake tensors (see device.cpp):
`pytest -p fake_gpu.plugin`, with FAKE_GPU in the environment, the path of the library that `build` made."""

import ctypes
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def build(compiler: list[str], folder: Path) -> Path:
    """Compile it, in seconds; raises CalledProcessError with what the compiler said."""
    from torch.utils import cpp_extension

    library = folder / "fake_gpu.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{cpp_extension.library_paths()[0]}", "-lc10", "-ltorch_cpu"]
    command = [*compiler, "-std=c++20", "-fPIC", "-shared", *includes, SOURCE, "-o", library, *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


if "FAKE_GPU" in os.environ:
    torch_folder = Path(find_spec("torch").origin).parent  # found, not imported yet
    ctypes.CDLL(str(torch_folder / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ["FAKE_GPU"])
