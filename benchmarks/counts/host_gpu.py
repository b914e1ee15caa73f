"""A GPU that runs nothing, under Triton's own launcher: what a launch costs the host, and what it hands to the driver.

`stubbed()` puts a libcuda whose calls all succeed (host_gpu.c, compiled when it is asked for) under Triton's driver and
lets the Triton kernels take CPU tensors. Kernels are compiled for the architecture for real, and everything that the
host does for a launch is done: only cuLaunchKernelEx returns at once. Results stay whatever the memory held.

For a process of its own, without Triton's interpreter: the stub remains loaded.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

_SOURCE = Path(__file__).with_name("host_gpu.c")


class Stub:
    """The library that stands for the driver's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._launches = ctypes.c_long.in_dll(library, "gdd_launches")
        self.compiled: dict[int, Any] = {}
        """Triton's kernels by their handle."""

    @property
    def launches(self) -> int:
        """How many there have been."""
        return self._launches.value


@contextlib.contextmanager
def stubbed(architecture: int = 90) -> Iterator[Stub]:
    """In this block Triton's kernels are launched on a GPU that is none, and take CPU tensors."""
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    import gdd_fast.backend
    from gdd_fast.kernels import _launch, group_norm_silu

    folder = tempfile.TemporaryDirectory()  # which goes with this call
    path = Path(folder.name, "libcuda.so.1")
    includes = f"-I{Path(nvidia.__file__).parent / 'include'}"
    flags = ["-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", includes]
    subprocess.run([os.environ.get("CC", "cc"), *flags, str(_SOURCE), "-o", str(path)], check=True)
    # found by its name from now on, as the driver's is where there is one
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    stub = Stub(library)
    load = CompiledKernel._init_handles

    def loaded(kernel: CompiledKernel) -> None:
        load(kernel)
        stub.compiled[kernel.function] = kernel

    programs = lambda device: 2 * 132
    with (
        mock.patch.object(knobs.nvidia, "libcuda_path", folder.name),
        mock.patch.object(CompiledKernel, "_init_handles", loaded),
        mock.patch.object(gdd_fast.backend, "_triton_obstacle", lambda device: None),
        mock.patch.object(_launch, "programs_wanted", programs),
        mock.patch.object(group_norm_silu, "programs_wanted", programs),
    ):
        driver.set_active(Driver())
        torch.set_flush_denormal(True)  # in memory that nothing has written they are common, and slow
        try:
            yield stub
        finally:
            torch.set_flush_denormal(False)
            driver._active = None  # reset_active asks for the GPU's, which there is none of
