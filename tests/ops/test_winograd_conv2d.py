"""winograd_conv2d: the convolution of the definition, on every instruction set, at every border and in either type."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from gdd_fast.errors import InputError
from gdd_fast.ops import winograd_conv2d as module
from gdd_fast.ops.winograd_conv2d import takes, winograd_conv2d, winograd_conv2d_ref, winograd_weight

SHAPES = [(1, 16, 32, 4, 4), (2, 32, 64, 5, 7), (1, 64, 32, 1, 9), (3, 48, 96, 18, 18), (2, 16, 32, 40, 8)]
KERNEL = pytest.mark.skipif(not takes(torch.empty(32, 16, 3, 3)), reason="no kernel for this processor")
# in a process of its own, as torch reads the variable once
ON_AVX2 = """
import torch
from gdd_fast.ops.winograd_conv2d import winograd_conv2d, winograd_weight
torch.manual_seed(0)
x, w, b = torch.randn(2, 32, 9, 11), torch.randn(64, 32, 3, 3), torch.randn(64)
packed = winograd_weight(w)
assert packed.shape == (36, 4, 32, 16), packed.shape
want = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1)
for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
    if dtype == torch.bfloat16:
        want = torch.nn.functional.conv2d(x.to(dtype).double(), w.double(), b.double(), padding=1)
    error = (winograd_conv2d(x.to(dtype), packed, b).double() - want).norm() / want.norm()
    assert error < bound, error
"""


def inputs(n, channels, out, h, w, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, h, w, generator=generator).to(dtype)
    weight = torch.randn(out, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    return x, weight, torch.randn(out, generator=generator)


def error(y, want):
    return ((y.double() - want).norm() / want.norm()).item()


@KERNEL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_equals_the_definition(shape, layout):
    """To five times the rounding error of a direct convolution, which sums one product a term."""
    x, weight, bias = inputs(*shape)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = winograd_conv2d(x.contiguous(memory_format=layout), winograd_weight(weight), bias)
    assert y.dtype == torch.float32 and y.shape == want.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, want) <= 5 * max(error(winograd_conv2d_ref(x, weight, bias), want), 1e-7)
    without = winograd_conv2d(x, winograd_weight(weight))
    torch.testing.assert_close(without + bias[:, None, None], y, rtol=1e-5, atol=1e-5)


@KERNEL
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_transposed_weight_gives_the_inputs_gradient(layout):
    _, weight, _ = inputs(1, 96, 64, 4, 4)
    weight = weight.contiguous(memory_format=layout)
    dy = torch.randn(2, 64, 9, 6, generator=torch.Generator().manual_seed(1))
    want = torch.nn.grad.conv2d_input((2, 96, 9, 6), weight.double(), dy.double(), padding=1)
    packed = torch.ops.gdd_fast_C.winograd_conv2d_weight(weight, True)
    assert error(winograd_conv2d(dy, packed), want) < 2e-6


@KERNEL
def test_bfloat16_is_rounded_once():
    """Summed in float32, so that it is as close as the nearest bfloat16 is, which plain PyTorch's weights are not."""
    x, weight, bias = inputs(3, 48, 96, 18, 18, dtype=torch.bfloat16)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = winograd_conv2d(x, winograd_weight(weight), bias)
    assert y.dtype == torch.bfloat16
    assert error(y, want) <= 1.01 * error(want.bfloat16(), want)


@KERNEL
def test_threads_and_runs_of_tiles_change_nothing():
    """More tiles than one run has, and a batch whose images are each what they are alone."""
    x, weight, bias = inputs(5, 16, 32, 24, 20)
    packed, before = winograd_weight(weight), torch.get_num_threads()
    alone = torch.cat([winograd_conv2d(image[None], packed, bias) for image in x])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(winograd_conv2d(x, packed, bias), alone)
    finally:
        torch.set_num_threads(before)


@KERNEL
def test_what_is_not_finite_stays_in_its_tiles():
    x, weight, bias = inputs(1, 16, 32, 12, 12)
    x[0, 3, 5, 5] = torch.nan
    wrong = winograd_conv2d(x, winograd_weight(weight), bias).isnan().any(1)[0]
    assert wrong[4:7, 4:7].all()
    assert not wrong[:, 8:].any() and not wrong[8:].any()


@KERNEL
def test_an_empty_batch_has_an_empty_result():
    _, weight, bias = inputs(1, 16, 32, 4, 4)
    assert winograd_conv2d(torch.empty(0, 16, 4, 4), winograd_weight(weight), bias).shape == (0, 32, 4, 4)


@KERNEL
def test_with_avx2_alone():
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", ON_AVX2], env=environment, check=True)


@KERNEL
def test_what_does_not_fit_is_refused():
    x, weight, bias = inputs(1, 16, 32, 4, 4)
    packed = winograd_weight(weight)
    for arguments in ((x[:, :8], packed), (x.half(), packed), (x, packed, bias[:16]), (x[0], packed)):
        with pytest.raises(InputError, match="winograd_conv2d"):
            winograd_conv2d(*arguments)
    with pytest.raises(InputError, match="no gradient"):
        winograd_conv2d(x.requires_grad_(), packed)


@pytest.mark.parametrize("shape", [(32, 16, 1, 1), (32, 3, 3, 3), (24, 16, 3, 3), (32, 16, 5, 5)], ids=str)
def test_other_weights_are_left_to_the_library(shape):
    weight = torch.randn(shape)
    assert not takes(weight)
    with pytest.raises(InputError, match="no kernel"):
        winograd_weight(weight)


def test_tiles_are_counted_with_those_cut_off():
    assert module.tiles(torch.Size((2, 8, 5, 4))) == 4
