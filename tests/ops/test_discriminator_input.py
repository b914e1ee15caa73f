"""discriminator_input: as accurate as normalising, resizing and casting one after the other, and its exact adjoint."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F

from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops.discriminator_input import OPERATOR, discriminator_input, discriminator_input_ref
from parity import assert_as_accurate_as_torch, backends, device_for

BACKENDS = pytest.mark.parametrize("backend", backends(OPERATOR))
SCALE = [[2.2, 2.3, 2.1], [1.0, 1.0, 1.0]]
SHIFT = [[0.1, -0.2, 0.3], [0.0, 0.0, 0.0]]
# (N, C, H, W), size: the networks' enlargement in small, odd ratios, shrinking, no resizing, single pixels
CASES = [
    ((2, 3, 4, 4), 28),
    ((3, 1, 4, 4), 28),
    ((1, 3, 5, 7), 13),
    ((2, 1, 9, 6), 4),
    ((2, 3, 6, 6), 6),
    ((1, 3, 1, 1), 3),
    ((1, 1, 2, 3), 1),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch stride": lambda x: torch.stack([x, x], 1)[:, 1],
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


def images(shape, dtype=torch.float32, backend="torch"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device_for(backend), dtype)


def fused(size, dtype, backend):
    return lambda x: tuple(discriminator_input(x, SCALE, SHIFT, size, dtype, backend))


def ref(size, dtype):
    """The definition in `dtype`; in float64 where the rule asks for float64."""
    return lambda x: tuple(discriminator_input_ref(x, SCALE, SHIFT, size, x.dtype if x.dtype.itemsize == 8 else dtype))


@BACKENDS
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_parity_of_outputs_and_gradient(dtype, out, shape, size, backend):
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](images(shape, dtype, backend)).requires_grad_()
        assert_as_accurate_as_torch(fused(size, out, backend), ref(size, out), [x])


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, backend):
    x = LAYOUTS[layout](images((3, 3, 4, 6), backend=backend))
    for got, want in zip(fused(9, None, backend)(x), ref(9, x.dtype)(x.contiguous()), strict=True):
        torch.testing.assert_close(got, want)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_definition_is_normalise_then_resize_then_cast():
    x, std, mean = images((2, 3, 4, 4)), [0.229, 0.224, 0.225], [0.485, 0.456, 0.406]
    scale, shift = [0.5 / s for s in std], [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
    normalised = ((x + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    want = F.interpolate(normalised, (28, 28), mode="bilinear", align_corners=False)
    torch.testing.assert_close(discriminator_input_ref(x, [scale], [shift], 28)[0], want)


@BACKENDS
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_backward_is_the_adjoint(shape, size, backend):
    """<A x, y> = <x, A' y>, with the shift left out of A."""
    x = images(shape, backend=backend).requires_grad_()
    zero = [[0.0] * 3] * 2
    ys = discriminator_input(x, SCALE, zero, size, backend=backend)
    duals = [torch.randn(y.shape, generator=torch.Generator().manual_seed(b)).to(y) for b, y in enumerate(ys)]
    (dx,) = torch.autograd.grad(ys, x, duals)
    left = sum((y.double() * d.double()).sum() for y, d in zip(ys, duals, strict=True))
    torch.testing.assert_close((x.double() * dx.double()).sum(), left, rtol=1e-5, atol=1e-4)


def test_derivatives_of_the_definition():
    for shape, size in CASES:
        x = images(shape, torch.float64).requires_grad_()
        function = lambda x, size=size: tuple(discriminator_input(x, SCALE, SHIFT, size))
        assert gradcheck(function, x, fast_mode=True)
        assert gradgradcheck(lambda x, f=function: [y**2 for y in f(x)], x, fast_mode=True)


@BACKENDS
@pytest.mark.parametrize(("shape", "size"), CASES[:4], ids=str)
def test_second_derivative(shape, size, backend):
    """That of a penalty on the gradient, as R1 is, against the definition's."""

    def penalty_gradient(function, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(sum((y**3).sum() for y in function(x)), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    x = images(shape, backend=backend)
    got = penalty_gradient(fused(size, None, backend), x)
    want = penalty_gradient(ref(size, x.dtype), x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@BACKENDS
def test_gradient_of_one_backbone_only(backend):
    x = images((2, 3, 4, 4), backend=backend).requires_grad_()
    got, want = (f(x)[1].square().sum() for f in (fused(9, None, backend), ref(9, x.dtype)))
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@BACKENDS
def test_repeats_to_the_bit(backend):
    x = images((5, 3, 8, 8), torch.bfloat16, backend).requires_grad_()
    results = []
    for _ in range(2):
        ys = fused(30, None, backend)(x)
        results.append([*ys, *torch.autograd.grad(sum(y.float().square().sum() for y in ys), x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BACKENDS
def test_registration_and_compile(backend):
    flat = [n for triple in SCALE for n in triple], [n for triple in SHIFT for n in triple]
    for shape in ((2, 3, 4, 5), (2, 1, 4, 5)):
        for layout in ("contiguous", "channels_last"):
            x = LAYOUTS[layout](images(shape, backend=backend)).requires_grad_()
            arguments = (x, *flat, 9, torch.float32, backend)
            opcheck(torch.ops.gdd_fast.discriminator_input.default, arguments)
            dys = [torch.randn(2, 3, 9, 9, device=x.device, requires_grad=True) for _ in SCALE]
            arguments = (dys, flat[0], *shape[1:], torch.float32, layout == "channels_last", backend)
            opcheck(torch.ops.gdd_fast.discriminator_input_backward.default, arguments)
    function = lambda x: sum(y.square() for y in discriminator_input(x * 2, SCALE, SHIFT, 9, backend=backend))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, function)]
    torch.testing.assert_close(*grads)


@BACKENDS
def test_empty_batch_and_nothing_saved(backend):
    saved = []
    x = images((0, 3, 4, 4), backend=backend).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = fused(8, None, backend)(x)
        fused(8, None, backend)(images((2, 3, 4, 4), backend=backend).requires_grad_())
    assert [y.shape for y in ys] == [(0, 3, 8, 8)] * 2
    assert torch.autograd.grad(sum(y.sum() for y in ys), x)[0].shape == x.shape
    assert not saved


def test_bad_input_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match="1 or 3"):
        discriminator_input(torch.zeros(1, 2, 4, 4), SCALE, SHIFT, 8)
    with pytest.raises(InputError, match="int64"):
        discriminator_input(x.long(), SCALE, SHIFT, 8)
    with pytest.raises(InputError, match="three numbers"):
        discriminator_input(x, [[1.0]], [[0.0]], 8)
    with pytest.raises(InputError, match="1 to 4 backbones"):
        discriminator_input(x, SCALE * 3, SHIFT * 3, 8)
    with pytest.raises(InputError, match="size"):
        discriminator_input(x, SCALE, SHIFT, 0)
    with pytest.raises(BackendError, match="float64"):
        discriminator_input(x.double(), SCALE, SHIFT, 8, backend="cpp")
    with pytest.raises(BackendError, match="no triton implementation"):
        discriminator_input(x, SCALE, SHIFT, 8, backend="triton")
