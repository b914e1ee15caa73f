"""BackboneInput: what torchvision's preprocessing makes of images, differentiable twice, with nothing large saved."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from benchmarks.counts.dispatched import Count
from gdd_fast.models.backbone_input import BackboneInput

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# (N, C, H, W), size: enlarging, grey, odd ratios, shrinking, no resizing, single pixels, no images
CASES = [
    ((2, 3, 4, 4), 28),
    ((3, 1, 4, 4), 28),
    ((1, 3, 5, 7), 13),
    ((2, 1, 9, 6), 4),
    ((2, 3, 6, 6), 6),
    ((1, 3, 1, 1), 3),
    ((0, 3, 4, 4), 8),
]


def images(shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).sub(1).to(dtype)


def formula(x, size):
    """Resized, then normalised as torchvision has it, in float64."""
    x = x.double().expand(-1, 3, -1, -1)
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False) if x.numel() else x.new_zeros(0, 3, 8, 8)
    return ((x + 1) / 2 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)


@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_formula_rounded_once(shape, size, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images(shape).contiguous(memory_format=layout)
        y = BackboneInput(MEAN, STD, size)(x, dtype)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
        torch.testing.assert_close(y.double(), formula(x, size), rtol=rounding, atol=4e-6)


@pytest.mark.parametrize(("shape", "size"), CASES[:-1], ids=str)
def test_first_and_second_derivatives(shape, size):
    x = images(shape, torch.float64).requires_grad_()
    module = BackboneInput(MEAN, STD, size).double()
    function = lambda x: module(x, torch.float64)
    assert gradcheck(function, x, fast_mode=True)
    assert gradgradcheck(lambda x: function(x) ** 2, x, fast_mode=True)


def test_nothing_of_its_size_is_saved_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        BackboneInput(MEAN, STD, 64)(images((2, 3, 8, 8)).requires_grad_(), torch.bfloat16)
    assert sum(saved) <= 3


def test_it_is_traced_as_a_whole():
    x = images((2, 3, 4, 5)).requires_grad_()
    module = BackboneInput(MEAN, STD, 9)
    function = lambda x: module(x * 2, torch.float32).square()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, function)))


def test_its_constants_are_no_weights_and_keep_their_digits_wherever_it_goes():
    module = BackboneInput(MEAN, STD, 9)
    assert not module.state_dict() and not list(module.parameters())
    address, want = module.scale.data_ptr(), module.scale.clone()
    assert module.to("cpu").to(torch.float32).scale.data_ptr() == address  # what a captured step reads
    for name in ("bfloat16", "half", "double", "float"):
        getattr(module, name)()
        assert module.scale.dtype == (torch.float64 if name == "double" else torch.float32)
        torch.testing.assert_close(module.scale.float(), want, rtol=0, atol=0)
    with torch.device("meta"):
        empty = BackboneInput(MEAN, STD, 9)
    assert empty.scale.is_meta
    assert torch.equal(copy.deepcopy(empty).to_empty(device="cpu").scale, want)


def test_a_call_makes_no_constants():
    x, module = images((2, 1, 4, 4)), BackboneInput(MEAN, STD, 9)
    with Count() as counted:
        module(x, torch.bfloat16)
    done = {"aten.addcmul.default", "aten.upsample_bilinear2d.default", "aten._to_copy.default"}
    assert set(counted.operators) - {"aten.promote_types.default"} == done, counted.operators
