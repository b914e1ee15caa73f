"""The kernels for small maps: each its definition, on every instruction set, at every border, in either type."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gdd_fast.ops.attention import attention_formula
from gdd_fast.ops.resample2d import resample2d_ref
from gdd_fast.ops.small_maps import (
    panel_conv2d,
    panel_conv2d_ref,
    panel_weight,
    runs_here,
    small_attention,
    small_resample2d,
)

pytestmark = pytest.mark.skipif(not runs_here(), reason="no kernel for this processor")

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
# images, channels, out, height, width, window, border, channels of the parts
CONVOLUTIONS = [
    (1, 64, 64, 4, 4, 3, 1, ()),
    (2, 5, 37, 5, 7, 3, 1, (3,)),
    (1, 1, 32, 1, 9, 3, 1, ()),
    (3, 32, 1, 16, 16, 3, 1, ()),
    (1, 32, 48, 8, 8, 3, 1, (16, 8)),
    (2, 64, 192, 8, 8, 1, 0, ()),
    (1, 7, 16, 3, 1, 1, 0, (2, 9)),
    (2, 4, 32, 6, 5, 3, 2, (3,)),
    (2, 9, 33, 6, 5, 3, 0, ()),
]


def filled(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def bound(want: Tensor, dtype: torch.dtype) -> float:
    """Sums in float32, rounded once to the type."""
    return 1e-6 if dtype == torch.float32 else 1.01 * error(want.to(dtype), want)


def convolution(case, dtype: torch.dtype, layout: torch.memory_format, scale: float):
    n, channels, out, h, w, size, padding, parts = case
    high, wide = h + 2 * padding - size + 1, w + 2 * padding - size + 1
    x = filled(n, channels, h, w, dtype=dtype).contiguous(memory_format=layout)
    maps = [
        filled(n, c, high, wide, seed=i, dtype=dtype).contiguous(memory_format=layout) for i, c in enumerate(parts, 1)
    ]
    weights = [filled(out, channels, size, size, seed=7) / (size * channels**0.5)]
    weights += [filled(out, c, 1, 1, seed=8 + c) / c**0.5 for c in parts]
    bias, add = filled(out, seed=5), filled(n, out, high, wide, seed=6, dtype=dtype).contiguous(memory_format=layout)
    double = [t.double() for t in (x, *maps, *weights, bias, add)]
    count = len(maps)
    want = torch.nn.functional.conv2d(double[0], double[1 + count], double[-2], padding=padding)
    for part, weight in zip(double[1 : 1 + count], double[2 + count : -2], strict=True):
        want = want + torch.nn.functional.conv2d(part, weight)
    return x, maps, weights, bias, add, want + scale * double[-1]


@TYPES
@LAYOUTS
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_a_convolution_with_what_is_added_equals_the_definition(case, layout, dtype):
    x, maps, weights, bias, add, want = convolution(case, dtype, layout, 0.5)
    y = panel_conv2d(x, panel_weight(weights), bias, *case[5:7], parts=maps, add=add, scale=0.5)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, want) <= bound(want, dtype)
    reference = panel_conv2d_ref(x, weights, bias, case[6], maps, add, 0.5)
    assert error(reference, want) <= bound(want, dtype)
    without = panel_conv2d(x, panel_weight(weights), bias, *case[5:7], parts=maps)
    expected = want - 0.5 * add.double()
    assert error(without, expected) <= bound(expected, dtype)


def test_threads_and_the_batch_change_nothing():
    x, maps, weights, bias, add, _ = convolution(
        (5, 32, 64, 9, 7, 3, 1, (16,)), torch.float32, torch.channels_last, 1.0
    )
    packed, before = panel_weight(weights), torch.get_num_threads()
    alone = [
        panel_conv2d(a[None], packed, bias, 3, 1, parts=[b[None]], add=c[None])
        for a, b, c in zip(x, *maps, add, strict=True)
    ]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(
                panel_conv2d(x, packed, bias, 3, 1, parts=maps, add=add), torch.cat(alone), rtol=0, atol=0
            )
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_window():
    x, weight = filled(1, 8, 6, 6), filled(32, 8, 3, 3)
    x[0, 3, 2, 2] = torch.nan
    wrong = panel_conv2d(x, panel_weight([weight]), torch.zeros(32), 3, 1).isnan().any(1)[0]
    assert wrong[1:4, 1:4].all() and wrong.sum() == 9


@TYPES
@LAYOUTS
@pytest.mark.parametrize("taps", [2, 4, 6])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("size", [(2, 24, 8, 8), (1, 70, 6, 9), (1, 3, 7, 6)], ids=str)
def test_resampling_equals_the_definition(size, up, taps, layout, dtype):
    x = filled(*size, dtype=dtype).contiguous(memory_format=layout)
    row = filled(taps, seed=1).abs()
    kernel, padding = (row[:, None] * row / row.sum() ** 2)[None, None], taps // 2 - 1
    wanted = {"up": up, "padding": padding}
    want = resample2d_ref(x.double(), kernel.double(), **wanted)
    y = small_resample2d(x, kernel, **wanted)
    assert y.shape == want.shape and y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, want) <= bound(want, dtype)
    add = filled(*want.shape, seed=2, dtype=dtype)
    want = (want + add.double()) * 0.7
    assert error(small_resample2d(x, kernel, add=add, scale=0.7, **wanted), want) <= bound(want, dtype)


@TYPES
@LAYOUTS
@pytest.mark.parametrize(
    ("heads", "dim", "h", "w"), [(1, 64, 8, 8), (2, 24, 4, 4), (4, 40, 5, 7), (1, 16, 1, 1), (1, 32, 16, 16)]
)
def test_attention_equals_the_definition(heads, dim, h, w, layout, dtype):
    qkv = (3 * filled(2, 3 * heads * dim, h, w)).to(dtype).contiguous(memory_format=layout)
    want = attention_formula(qkv.double(), heads, "blocks")
    y = small_attention(qkv, heads)
    assert y.shape == want.shape and y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, want) <= (3e-6 if dtype == torch.float32 else bound(want, dtype))


def test_large_logits_neither_overflow_nor_vanish():
    qkv = 100 * filled(1, 96, 4, 4)
    want = attention_formula(qkv.double(), 1, "blocks")
    assert error(small_attention(qkv, 1), want) <= 1e-4


def test_an_empty_batch_has_an_empty_result():
    empty = torch.empty(0, 48, 4, 4)
    assert small_attention(empty, 1).shape == (0, 16, 4, 4)
    assert panel_conv2d(empty, panel_weight([filled(32, 48, 3, 3)]), torch.zeros(32), 3, 1).shape == (0, 32, 4, 4)
    assert small_resample2d(empty, torch.full((1, 1, 2, 2), 0.25), up=True, padding=0).shape == (0, 48, 8, 8)


def test_what_does_not_fit_is_refused():
    x, packed, bias = filled(1, 16, 4, 4), panel_weight([filled(32, 16, 3, 3)]), torch.zeros(32)
    for wrong in (x[:, :8], x.half(), x[0]):
        with pytest.raises(ValueError, match=r"panel_conv2d|maps must be"):
            panel_conv2d(wrong, packed, bias, 3, 1)
    with pytest.raises(ValueError, match="panel_conv2d"):
        panel_conv2d(x, packed, bias, 1, 0)
    with pytest.raises(ValueError, match="match in all but channels"):
        panel_conv2d(x, packed, bias, 3, 1, parts=[x[:, :, :2]])
    with pytest.raises(ValueError, match="what is added"):
        panel_conv2d(x, packed, bias, 3, 1, add=x)
    with pytest.raises(ValueError, match="heads"):
        small_attention(x, 1)
    with pytest.raises(ValueError, match="filter"):
        small_resample2d(x, torch.ones(1, 1, 6, 6), up=False, padding=0)


def test_with_avx2_alone():
    """In a process of its own, as torch reads the variable once."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is that process")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", __file__], env=environment, check=True
    )
