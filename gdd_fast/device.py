"""The device of a run, how a GPU computes float32 on it, and how cuDNN chooses."""

import contextlib
import platform
from collections.abc import Iterator
from typing import Literal

import torch

from gdd_fast.config import Precision
from gdd_fast.errors import ConfigError


def pick_device(option: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists, or `ConfigError`."""
    if option == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(option)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, not {option!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"--device {option}: this machine has {count} usable CUDA devices; use --device cpu")
    return device


def fast_layout(device: torch.device, precision: Precision = "bf16") -> torch.memory_format:
    """The memory format that convolutions of a network in `precision` are fast in.

    On a GPU that is what tensor cores read, channels_last, and where they are not used, in fp32 without TF32, NCHW:
    there channels_last took 1.6 times as long (pytorch issue 44943). On a CPU it is channels_last from AVX2 on.
    With SSE4.1 or AVX, oneDNN convolves float32 so (`jit:sse41`, `jit:avx` in its verbose log) in 1.6 times the time of
    NCHW, from AVX2 on (`brg_conv`) as fast or faster; bfloat16 is PyTorch's own there, and takes half as long so. Other
    processors have not been measured and use PyTorch's default. `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` imitate
    older processors.
    """
    if device.type != "cpu":
        return torch.contiguous_format if precision == "fp32" else torch.channels_last
    older = precision == "bf16" and platform.machine().lower() in ("x86_64", "amd64")
    if older or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return torch.channels_last
    return torch.contiguous_format


@contextlib.contextmanager
def gpu_arithmetic(*precisions: Precision) -> Iterator[None]:
    """float32 matrix products and convolutions on tensor cores in TF32 if one of `precisions` is, else in full fp32.

    With TF32, PyTorch refuses to read its older switch of matrix products (`torch.get_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32`) within the block.

    torch's own default allows TF32 in convolutions only; the public recipe allows it nowhere.

    cuDNN times its algorithms once for each convolution and keeps the fastest, as in the public code: the shapes of a
    run do not change. What it keeps may differ from run to run, so that these agree but for rounding.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    with _float32("tf32" if "tf32" in precisions else "ieee"):
        cudnn.benchmark = True
        try:
            yield
        finally:
            cudnn.benchmark = before


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 matrix products and convolutions of a GPU in full fp32, as on a CPU."""
    with _float32("ieee"):
        yield


@contextlib.contextmanager
def _float32(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """For a block in a program of others, or within another such block.

    Whichever of PyTorch's two interfaces they chose with, older (`allow_tf32`) or newer (`fp32_precision`), their
    choice is not lost. Only the newer is read and set: the older cannot be read where the newer says something else.
    """
    # recurrent networks too, which we have none of: what the older interface reads of cuDNN is both
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = precision
    try:
        yield
    finally:
        for kind, choice in zip(kinds, before, strict=True):
            kind.fp32_precision = choice
