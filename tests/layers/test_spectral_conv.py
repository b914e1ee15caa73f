"""SpectralConv2d: PyTorch's spectral norm, by other sums: forward, both derivatives, its vectors and its state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gdd_fast.layers.spectral_conv import SpectralConv2d

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# input shape, out, kernel, stride, padding: a product of few pixels, a result divided, one too large for that
FEW, DIVIDED, LARGE = ((3, 32, 4, 4), 64, 4, 2, 1), ((4, 24, 16, 12), 32, 4, 2, 1), ((4, 4, 24, 24), 8, 3, 1, 1)
OBLONG, CUT = ((2, 32, 5, 3), 64, (3, 2), 1, (1, 0)), ((2, 32, 5, 8), 64, 4, 2, 1)  # a last row that no window sees
NAMES = {"few pixels": FEW, "divided": DIVIDED, "large": LARGE, "oblong": OBLONG, "cut": CUT}
CASES = pytest.mark.parametrize("case", NAMES.values(), ids=NAMES)
LAYOUTS = pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=str)


def pair(case, dtype=torch.float32, layout=CHANNELS_LAST, bias=True):
    """Ours, PyTorch's with the same numbers, and an input."""
    shape, out, kernel, stride, padding = case
    torch.manual_seed(0)
    ours = SpectralConv2d.make(shape[1], out, kernel, stride=stride, padding=padding, bias=bias)
    theirs = spectral_norm(nn.Conv2d(shape[1], out, kernel, stride=stride, padding=padding, bias=bias))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = (net.to(dtype=dtype, memory_format=layout) for net in (ours, theirs))
    return ours, theirs, torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)


def results(net, x):
    """By name: output and gradients of two calls, the input's gradient's norm differentiated (R1), and the vectors."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    first, second = net(x), net(2 * x)
    (first.sin().sum() + second.cos().sum()).backward()
    found = {"first": first, "second": second, "dx": x.grad.clone()}
    found |= {f"d {name}": p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    (dx,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
    dx.square().sum().backward()
    found |= {f"R1 {name}": p.grad for name, p in net.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    return {**found, "evaluated": net(x)}


@CASES
@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
def test_is_pytorchs_spectral_norm(case, layout, bias):
    ours, theirs, x = pair(case, torch.float64, layout, bias)
    got, want = results(ours, x), results(theirs, x)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9 * want[name].abs().max().item())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@CASES
def test_float32_is_as_accurate_as_pytorchs(case):
    ours, theirs, x = pair(case)
    exact = results(copy.deepcopy(theirs).double(), x.double())
    got, eager = results(ours, x), results(theirs, x)
    for name, want in exact.items():
        error, allowed = ((t[name].double() - want).norm() / want.norm() for t in (got, eager))
        assert error <= 2 * max(allowed, 1e-7), (name, error, allowed)


@pytest.mark.parametrize("divide", [True, False])
def test_other_types_and_those_who_ask_have_pytorchs_own(divide):
    ours, theirs, x = pair(FEW, torch.bfloat16 if divide else torch.float32)
    ours.divide_result = divide
    got, want = results(ours, x), results(theirs, x)
    assert all(torch.equal(got[name], want[name]) for name in want)


@CASES
def test_strides_are_pytorchs(case):
    ours, theirs, x = pair(case)
    got, want = results(ours, x), results(theirs, x)
    for name in ("first", "dx", "d parametrizations.weight.original"):
        assert got[name].stride() == want[name].stride(), name


def test_no_pass_over_the_weight_but_the_power_iterations():
    """What it is for: the weight is neither divided nor copied."""
    ours, _, x = pair(FEW)
    weight = ours.parametrizations.weight.original
    with torch.profiler.profile(record_shapes=True) as profile:
        ours(x)
    sizes = ([*weight.shape], [len(weight), weight[0].numel()])
    passes = [
        e.key for e in profile.key_averages(group_by_input_shape=True) if e.input_shapes[:1] in ([s] for s in sizes)
    ]
    assert not {"aten::div", "aten::copy_", "aten::clone", "aten::mul"} & {*passes}, passes


def test_random_vectors_are_not_iterated():
    torch.manual_seed(0)
    for random in (False, True):
        conv = SpectralConv2d.make(8, 16, 3, random=random)
        weight = conv.parametrizations.weight.original.detach().flatten(1)
        norm = conv.parametrizations.weight[0]
        ratio = torch.dot(norm._u, weight @ norm._v) / torch.linalg.matrix_norm(weight, 2)
        assert (ratio < 0.5) == random


def test_what_pytorch_takes_is_taken():
    """Autocast, no images, an image without a batch, padding in words, backward of a call before a training one."""
    ours, theirs, x = pair(FEW)
    with torch.autocast("cpu", torch.bfloat16):
        for net in (ours, theirs):
            net(x).float().sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours(x[:0]).shape == theirs(x[:0]).shape and ours(x[0]).shape == theirs(x[0]).shape
    assert SpectralConv2d.make(4, 4, 3, padding="same")(torch.randn(1, 4, 8, 8)).shape == (1, 4, 8, 8)
    pixel, _, x = pair(((2, 8, 4, 4), 8, 1, 1, 0))
    kept = pixel.eval()(x)
    pixel.train()(x)
    kept.sum().backward()
