"""How a GPU computes float32 and how cuDNN chooses, for a block; put back afterwards."""

import contextlib
from collections.abc import Iterator

import torch

from gdd_fast.config import Precision


@contextlib.contextmanager
def gpu_arithmetic(*precisions: Precision) -> Iterator[None]:
    """float32 matrix products and convolutions on tensor cores in TF32 if one of `precisions` is, else in full fp32.

    torch's own default allows TF32 in convolutions only; the public recipe allows it nowhere.

    cuDNN times its algorithms once for each convolution and keeps the fastest, as in the public code: the shapes of a
    run do not change. What it keeps may differ from run to run, so that these agree but for rounding.
    """
    cudnn, wanted = torch.backends.cudnn, "tf32" in precisions
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    cudnn.allow_tf32, cudnn.benchmark = wanted, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 matrix products and convolutions of a GPU in full fp32: what is made there stands for other machines.

    For a block in a program of others: whichever of PyTorch's two interfaces they chose with, older (`allow_tf32`) or
    newer (`fp32_precision`), their choice is not lost. Reading the older would fail where they used the newer.
    """
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
