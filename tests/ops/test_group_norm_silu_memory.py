"""group_norm_silu: every layout of its input and gradient, elements far apart, and what it keeps for backward."""

import pytest
import torch
from torch import Tensor

from gdd_fast.ops._memory_format import memory_format
from gdd_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_ref
from norm_case import BACKENDS, LAYOUTS, Case
from parity import device_for, promised

LAYOUT_CASES = {
    "channel slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "channels_last slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


@BACKENDS
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_any_memory_layout_of_input_and_gradient(name, backend):
    case = Case((2, 8, 4, 3), 2, backend=backend)
    x, *rest = case.inputs
    change = LAYOUT_CASES[name]
    strange, dense = change(x.detach()).requires_grad_(), change(x.detach()).contiguous().requires_grad_()
    y, want = case.fused(strange, *rest), case.ref(dense, *rest)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=memory_format(strange))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    got = torch.autograd.grad(y, [strange, *rest], change(dy))
    wanted = torch.autograd.grad(want, [dense, *rest], change(dy).contiguous())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BACKENDS
@LAYOUTS
def test_results_are_dense_in_the_input_s_format(layout, backend):
    case = Case((2, 8, 4, 4), 2, layout=layout, backend=backend)
    y = case.fused(*case.inputs)
    assert y.is_contiguous(memory_format=layout)
    (dx,) = torch.autograd.grad(y.sum(), case.inputs[:1])  # the gradient of sum is expanded: all strides are zero
    assert dx.is_contiguous(memory_format=layout)


def test_one_image_whose_batch_stride_means_nothing():
    """PyTorch's norm refuses channels_last memory whose batch of one has another stride, as transposed tokens have."""
    x = torch.randn(4 * 16).as_strided((1, 16, 2, 2), (16, 1, 32, 16)).requires_grad_()
    y = group_norm_silu(x, 4, torch.ones(16), torch.zeros(16), backend="torch")
    torch.testing.assert_close(y, group_norm_silu_ref(x, 4, torch.ones(16), torch.zeros(16)))
    torch.autograd.grad(y, x, torch.ones_like(y).as_strided(y.shape, x.stride()))


@BACKENDS
def test_empty_batch(backend):
    case = Case((0, 4, 3, 3), 2, backend=backend)
    y = case.fused(*case.inputs)
    assert y.shape == (0, 4, 3, 3)
    gradients = torch.autograd.grad(y.sum(), case.inputs)
    assert [g.shape for g in gradients] == [t.shape for t in case.inputs]


@BACKENDS
def test_samples_more_than_two_to_the_31_elements_apart(backend):
    """In x, in its gradient and in what the skip connection was sliced from; the memory between is never touched."""
    case = Case((2, 4, 3, 3), 2, pair=4, rows=(), backend=backend)
    if case.inputs[0].is_cuda:
        pytest.skip("takes the memory that a CPU only promises")
    far = [promised(2**31 + 64).as_strided(t.shape, (2**31 + 16, 1, 12, 4)).copy_(t) for t in case.inputs[:2]]
    inputs = [t.detach().requires_grad_() for t in (*far, *case.inputs[2:])]
    y, want = case.fused(*inputs), case.ref(*case.inputs)
    torch.testing.assert_close(y, want)
    dy = promised(2**31 + 128).as_strided(y.shape, (2**31 + 16, 1, 24, 8)).copy_(y.detach())
    got = torch.autograd.grad(y, inputs, dy)
    for a, b in zip(got, torch.autograd.grad(want, case.inputs, y.detach()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_tiles_two_to_the_32_elements_apart(backend):
    """Pixels 2^20 elements apart and more of them than a tile holds, in a batch that is not split over programs."""
    if device_for(backend) == "cuda":
        pytest.skip("takes the memory that a CPU only promises")
    dense = torch.randn((1, 1, 4097, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    memory = promised(2**32 + 1, torch.float16)
    x = memory.as_strided(dense.shape, (1, 1, 2**20, 1)).copy_(dense).expand(8, 1, 4097, 1)
    weight, bias = torch.full((1,), 1.5), torch.ones(1)
    got = group_norm_silu(x, 1, weight, bias, backend=backend)
    torch.testing.assert_close(got, group_norm_silu_ref(dense, 1, weight, bias).expand(x.shape), rtol=2e-3, atol=2e-3)


def saved_bytes(function) -> int:
    """Of distinct memory that autograd keeps when `function` runs."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(kept.values())


@BACKENDS
@pytest.mark.parametrize("pair", [0, 8])
def test_saves_its_input_and_little_else(pair, backend):
    """Whatever its size and whatever saves it, in Python or in C++."""
    case = Case((2, 8, 16, 16), 2, pair=pair, dtype=torch.bfloat16, backend=backend)
    maps = sum(t.nbytes for t in case.inputs[: 2 if pair else 1])
    assert saved_bytes(lambda: case.fused(*case.inputs)) < 1.1 * maps
    assert saved_bytes(lambda: case.ref(*case.inputs)) > 4 * maps
