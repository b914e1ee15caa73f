"""The device of a run, how a GPU computes float32, and how cuDNN chooses its algorithms."""

import contextlib
import platform
from collections.abc import Iterator
from typing import Literal

import torch

from gdd_fast.config import Precision
from gdd_fast.errors import ConfigError


def pick_device(option: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError` for any other text or a missing device."""
    if option == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(option)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, not {option!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"--device {option}: this machine has {count} usable CUDA devices; use --device cpu")
    return device


def fast_layout(device: torch.device, precision: Precision = "bf16") -> torch.memory_format:
    """The memory format in which the convolutions of a network in `precision` are fastest.

    On a GPU that is channels_last, which tensor cores read; in fp32, which does not use them, it is NCHW: there
    channels_last took 1.6 times as long (pytorch issue 44943). On a CPU it is channels_last from AVX2 on. With SSE4.1
    or AVX, oneDNN's float32 convolutions (`jit:sse41`, `jit:avx` in its verbose log) took 1.6 times as long in
    channels_last as in NCHW, while bfloat16, which PyTorch convolves itself, took half as long; from AVX2 on
    (`brg_conv`) both are as fast or faster. Other processors, not measured, use PyTorch's default.
    `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` imitate older processors.
    """
    if device.type != "cpu":
        return torch.contiguous_format if precision == "fp32" else torch.channels_last
    older = precision == "bf16" and platform.machine().lower() in ("x86_64", "amd64")
    if older or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return torch.channels_last
    return torch.contiguous_format


@contextlib.contextmanager
def gpu_arithmetic(*precisions: Precision) -> Iterator[None]:
    """Run a GPU's float32 matrix products and convolutions in TF32 if `precisions` has "tf32", else in full fp32.

    With TF32, reading PyTorch's older switches for matrix products (`torch.get_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32`) raises an error within the block.

    torch's own default allows TF32 in convolutions only; the public recipe allows it nowhere.

    cuDNN times its algorithms once for each convolution and keeps the fastest, as in the public code: the shapes of a
    run do not change. Its choice may differ between runs, so that these agree only up to rounding.
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
    """Run a GPU's float32 matrix products and convolutions in full fp32, as on a CPU."""
    with _float32("ieee"):
        yield


@contextlib.contextmanager
def _float32(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Sets the precision for a block, which may be part of a program of others or of another such block.

    Whether that program chose by PyTorch's older interface (`allow_tf32`) or the newer (`fp32_precision`), its choice
    is restored. Only the newer is read and set: the older cannot be read while the two disagree.
    """
    # recurrent networks too, though we have none: the older interface's switch for cuDNN covers both
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = precision
    try:
        yield
    finally:
        for kind, choice in zip(kinds, before, strict=True):
            kind.fp32_precision = choice
