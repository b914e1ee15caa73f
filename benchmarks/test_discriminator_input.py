"""Images to the discriminator's two backbones, forward and backward, against one expression a backbone."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_peers import assert_as_accurate, timed
from gdd_fast.ops.discriminator_input import discriminator_input

SMOKE, FULL = ((2, 3, 8, 8), 24), ((8, 3, 32, 32), 224)
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))  # vgg16_bn's and lite0's
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stock(x: Tensor, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Resize, [-1, 1] to [0, 1], each backbone's normalisation, cast, channels_last."""
    x = (F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False) + 1) / 2
    results = []
    for mean, std in zip(MEANS, STDS, strict=True):
        mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (mean, std))
        results.append(((x - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last))
    return results


def fused(x: Tensor, size: int, dtype: torch.dtype) -> list[Tensor]:
    scale = [[0.5 / s for s in std] for std in STDS]
    shift = [[(0.5 - m) / s for m, s in zip(mean, std, strict=True)] for mean, std in zip(MEANS, STDS, strict=True)]
    return list(discriminator_input(x, scale, shift, size, dtype))


@pytest.mark.parametrize("peer", ["gdd_fast", "stock"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape_size", [SMOKE, pytest.param(FULL, marks=pytest.mark.slow)], ids=["smoke", "full"])
def test_discriminator_input(benchmark, shape_size, dtype, direction, peer):
    (shape, size), dtype_ = shape_size, DTYPES[dtype]
    function = stock if peer == "stock" else fused
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cotangents = [torch.randn(shape[0], 3, size, size).contiguous(memory_format=torch.channels_last) for _ in MEANS]

    def results(function, dtype: torch.dtype, input_dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Both outputs and the gradient of the images."""
        leaf = x.to(input_dtype).requires_grad_()
        outputs = function(leaf, size, dtype)
        gradient = torch.autograd.grad(outputs, leaf, [c.to(dtype) for c in cotangents])
        return [*(y.detach() for y in outputs), *gradient]

    def check() -> None:
        exact = results(stock, torch.float64, torch.float64)
        assert_as_accurate(results(function, dtype_), results(stock, dtype_), exact)

    leaf = x.clone().requires_grad_()
    outputs = function(leaf, size, dtype_)
    gradients = [c.to(dtype_) for c in cotangents]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return function(x, size, dtype_)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaf, gradients, retain_graph=True)

    moved = x.numel() * 4 + 2 * cotangents[0].numel() * torch.finfo(dtype_).bits // 8
    call = forward if direction == "forward" else backward
    timed(benchmark, f"discriminator_input {direction} {dtype} {shape} -> {size}", call, check, moved=moved)
