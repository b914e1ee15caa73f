"""relu_bits: one bit per element for backward, the same bits from every implementation."""

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from benchmarks.counts.offline import ARCHITECTURES, TritonCase, compile_triton
from gdd_fast.errors import ConfigError, InputError
from gdd_fast.ops.relu_bits import CEILING, OPERATOR, relu_bits, relu_bits_ref
from parity import backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
FUSED = pytest.mark.parametrize("backend", backends(OPERATOR)[1:])
ACTIVATIONS = pytest.mark.parametrize("activation", CEILING)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

# A 64-bit word of eight 0/1 bytes times this has the eight bits, first byte lowest, in its top byte.
_GATHER = 0x0102040810204080
# A byte repeated eight times, and of the i-th copy its i-th bit.
_REPEAT, _PICK = 0x0101010101010101, 0x8040201008040201 - (1 << 64)


def relu_bits_ref_(y: Tensor, ceiling: float) -> Tensor:
    """Clamp y to [0, ceiling] in place; the bits of where that is flat, uint8 (ceil(numel / 8),)."""
    flat = _in_memory_order(y)
    blocked = flat <= 0
    if ceiling < math.inf:
        blocked |= flat >= ceiling
    y.clamp_(0, None if ceiling == math.inf else ceiling)
    blocked = F.pad(blocked.view(torch.uint8), (0, -flat.numel() % 8))
    return (blocked.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def mask_bits_ref(dy: Tensor, bits: Tensor) -> Tensor:
    """dy, zero where its bit is 1, in a new tensor of the same strides."""
    flat = _in_memory_order(dy)
    blocked = (bits.to(torch.int64) * _REPEAT & _PICK).view(torch.uint8)[: flat.numel()] != 0
    dx = torch.empty_like(dy)
    torch.where(blocked, flat.new_zeros(()), flat, out=_in_memory_order(dx))
    return dx


def _in_memory_order(x: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)


def values(dtype, device, shape=(2, 3, 7, 5), layout=CHANNELS_LAST):
    """Values on, beside and far from both bends."""
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 6
    y.view(-1)[: min(7, y.numel())] = torch.tensor([0, -0.0, 6, 5.96875, 6.03125, math.inf, -math.inf])[: y.numel()]
    return y.contiguous(memory_format=layout)


@BACKENDS
@ACTIVATIONS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_pytorchs(dtype, layout, inplace, activation, backend):
    x = values(dtype, device_for(backend), layout=layout).requires_grad_()
    dy = torch.randn_like(x).mT.contiguous().mT  # not dense in either format
    y, want = relu_bits(x * 1, activation, inplace, backend), relu_bits_ref(x, activation)
    assert torch.equal(y, want) and y.is_contiguous(memory_format=layout)
    assert torch.equal(*(torch.autograd.grad(t, x, dy)[0] for t in (y, want)))


@BACKENDS
@ACTIVATIONS
def test_first_and_second_derivatives(activation, backend):
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (8 * x).to(device_for(backend)).requires_grad_()  # none beside a bend
    torch.autograd.gradcheck(lambda x: relu_bits(x, activation, backend=backend), x)
    torch.autograd.gradgradcheck(lambda x: relu_bits(x, activation, backend=backend).square(), x)


@FUSED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ceiling", CEILING.values())
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 1, 1, 1), (1, 8, 2, 4), (3, 17, 9, 11)], ids=str)
def test_bits_equal_the_definition_and_pytorchs_gradient(shape, ceiling, dtype, backend):
    y = values(dtype, device_for(backend), shape)
    leaf = y.clone().requires_grad_()
    want = F.relu(leaf) if ceiling == math.inf else F.relu6(leaf)
    dy = torch.randn_like(y)
    (want_dx,) = torch.autograd.grad(want, leaf, dy)
    clamped, expected = y.clone(), y.clone()
    bits, expected_bits = torch.ops.gdd_fast.relu_bits_(clamped, ceiling, backend), relu_bits_ref_(expected, ceiling)
    assert torch.equal(bits, expected_bits) and bits.numel() == -(-y.numel() // 8)
    assert torch.equal(clamped, want) and torch.equal(expected, want)
    for dx in (torch.ops.gdd_fast.mask_bits(dy, bits, backend), mask_bits_ref(dy, bits)):
        assert torch.equal(dx, want_dx) and dx.stride() == dy.stride()


TRITON = pytest.mark.parametrize("backend", [b for b in backends(OPERATOR) if b.values == ("triton",)])
# channels in octets and not, runs of pixels in octets and not, more than one program's elements
SHAPES = [(2, 16, 5, 3), (2, 3, 4, 6), (1, 6, 3, 3), (3, 1, 2, 2), (2, 24, 20, 20), (3, 40, 1, 1)]


@TRITON
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_is_added_as_in_a_pass_of_its_own(shape, dtype, layout, backend):
    """To the bit: the sum is rounded before it is compared with the bends; with the bits and without them. Triton's
    interpreter cuts sums off at bfloat16's last bit, where compiled code rounds them."""
    from gdd_fast.kernels import relu_bits as kernels

    y = values(dtype, device_for(backend), shape, layout)
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(y)
    tolerance = 2**-7 if dtype == torch.bfloat16 and y.is_cpu else 0
    for ceiling in CEILING.values():
        want = (y + bias[:, None, None]).contiguous(memory_format=layout)
        bits = relu_bits_ref_(want, ceiling)
        got, alone = y.clone(), y.clone()
        packed = torch.ops.gdd_fast.relu_bits_(got, ceiling, backend, bias)
        assert torch.equal(packed, bits) or (tolerance and ceiling == 6)  # which the interpreter's sums stay below
        assert kernels.clamp_(alone, ceiling, bias) is alone
        for clamped in (got, alone):
            torch.testing.assert_close(clamped, want, rtol=tolerance, atol=0)


@FUSED
def test_nan_is_kept(backend):
    y = torch.full((1, 1, 2, 2), math.nan, device=device_for(backend))
    bits = torch.ops.gdd_fast.relu_bits_(y, 6.0, backend)
    assert y.isnan().all() and not bits.any()


@FUSED
def test_registration_and_compile(backend):
    y = values(torch.float32, device_for(backend))
    opcheck(torch.ops.gdd_fast.relu_bits_.default, (y, 6.0, backend))
    bits = torch.ops.gdd_fast.relu_bits_(y.clone(), 6.0, backend)
    opcheck(torch.ops.gdd_fast.mask_bits.default, (y, bits, backend))
    x = y.requires_grad_()
    function = lambda x: relu_bits(x * 2, backend=backend).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, function)))


def test_bad_calls_are_refused():
    with pytest.raises(ConfigError, match="'gelu'"):
        relu_bits(torch.zeros(1, 2, 3, 3), "gelu")
    with pytest.raises(InputError, match="contiguous or channels_last"):
        relu_bits(torch.zeros(1, 2, 3, 6)[..., ::2])


def test_triton_kernels_compile_for_ampere_and_hopper():
    options, constants = {"num_warps": 4}, {"BLOCK": 256}
    cases = []
    for kind in ("*fp32", "*bf16", "*fp16", "*fp64"):
        clamp = {"y_ptr": kind, "bits_ptr": "*u8", "bias_ptr": kind, "size": "i64", "channels": "i32", "run": "i32"}
        mask = {"dy_ptr": kind, "bits_ptr": "*u8", "dx_ptr": kind, "size": "i32"}
        for ceiling, octet in ((None, "channels"), (6.0, "channel"), (6.0, "")):
            of = {**constants, "CEILING": ceiling, "OCTET": octet}
            cases.append(TritonCase("relu_bits_kernel", clamp, of, options))
        cases.append(TritonCase("mask_bits_kernel", mask, constants, options))
    doubles = ["*fp64" in case.signature.values() for case in cases for _ in ARCHITECTURES]
    for resources, double in zip(compile_triton("gdd_fast.kernels.relu_bits", cases), doubles, strict=True):
        resources.assert_no_spills()
        assert resources.registers <= (168 if double else 128), resources  # of channels in no octets
