"""The TF32 switches of a run, put back afterwards."""

import contextlib
from collections.abc import Iterator

import torch

from gdd_fast.config import TrainConfig


@contextlib.contextmanager
def allow_tf32(config: TrainConfig) -> Iterator[None]:
    """float32 matrix products and convolutions on tensor cores in TF32 if the run asks for it, in full fp32 if not.

    torch's own default allows TF32 in convolutions only; the public recipe allows it nowhere.
    """
    wanted = "tf32" in (config.generator.g_precision, config.discriminator.d_precision)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
