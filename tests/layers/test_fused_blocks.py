"""All fused operators against all definitions: a whole block, a whole network, and twenty steps of a stack of blocks.

Wherever a fused operator can run, it does: on a CPU the Triton kernels in their interpreter and the C++ operators. The
rule is the one of parity.py, for the steps as a whole: after the same ones on the same numbers, the fused run is at
most twice as far from a run in float64 as eager PyTorch in float32 is.
"""

import contextlib
import math

import pytest
import torch
from plain_network import plain_pytorch
from torch import Tensor, nn
from torch.func import functional_call

from gdd_fast.backend import obstacle
from gdd_fast.distill.freeze import freeze
from gdd_fast.distill.losses import discriminator_loss, generator_loss, r1_penalty
from gdd_fast.layers.linear import Init
from gdd_fast.models.edm import SongUNet
from gdd_fast.models.unet_block import UNetBlock
from gdd_fast.ops.group_norm_silu import OPERATOR
from parity import assert_as_accurate_as_torch, backends, device_for

pytestmark = [mark for parameter in backends(OPERATOR)[1:] for mark in parameter.marks]
DEVICE = device_for("triton")
STEPS = 20


def fuse(net: nn.Module, *order: str) -> nn.Module:
    """Every operator of `net` by the first fused implementation that runs here; by default a GPU's, if interpreted."""
    for module in net.modules():
        operator = getattr(module, "operator", None)
        if operator is not None:
            available = [b for b in order or ("triton", "cpp") if obstacle(operator, b, DEVICE) is None]
            module.backend = available[0] if available else "torch"
    return net


def block(*widths: int, adaptive: bool, **options) -> UNetBlock:
    """A block of the NCSN++ or the ADM kind, no weight at zero."""
    torch.manual_seed(0)
    ncsn = {"skip_scale": math.sqrt(0.5), "eps": 1e-6, "resample_proj": True, "resample_filter": [1, 3, 3, 1]}
    kind = {} if adaptive else ncsn
    init = Init("kaiming_uniform", weight=1.0, bias=1.0)
    return UNetBlock(*widths, adaptive_scale=adaptive, init=init, init_zero=init, **kind, **options).to(DEVICE)


BLOCKS = {
    "ncsn": lambda: block(16, 16, 8, adaptive=False),
    "ncsn pair": lambda: block(24, 16, 8, adaptive=False),
    "ncsn down": lambda: block(16, 16, 8, adaptive=False, down=True),
    "adm": lambda: block(16, 24, 8, adaptive=True),
    "adm attention": lambda: block(16, 16, 8, adaptive=True, num_heads=1),
}


def block_call(name: str, layer: UNetBlock):
    """The block as a function of tensors, its parameters among them, and those tensors."""
    generator = torch.Generator().manual_seed(0)
    widths = (16, layer.in_channels - 16) if name.endswith("pair") else (layer.in_channels,)
    maps = [torch.randn((2, c, 4, 4), generator=generator).to(DEVICE) for c in widths]
    emb = torch.randn((2, 8), generator=generator).to(DEVICE)
    names = [key for key, _ in layer.named_parameters()]

    def run(*tensors: Tensor) -> Tensor:
        *maps, emb = tensors[: len(widths) + 1]
        x = tuple(maps) if len(maps) == 2 else maps[0]
        values = dict(zip(names, tensors[len(widths) + 1 :], strict=True))
        return functional_call(layer, values, (x, emb))

    tensors = [*maps, emb, *(p.detach() for p in layer.parameters())]
    return run, [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    """Output and every gradient; the fused block takes the convolutions' biases into its norms and residuals."""
    fused, inputs = block_call(name, fuse(BLOCKS[name]()))
    layer = BLOCKS[name]()

    def ref(*tensors: Tensor) -> Tensor:
        with plain_pytorch(layer):
            return block_call(name, layer)[0](*tensors)

    assert_as_accurate_as_torch(fused, ref, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("name", ["ncsn pair", "adm attention"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_block_compiles_without_graph_breaks(name, fused):
    layer = BLOCKS[name]()
    layer = fuse(layer) if fused else layer
    run, inputs = block_call(name, layer)
    inputs = [t.requires_grad_() for t in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = run(*inputs)
    y = compiled(*inputs)
    torch.testing.assert_close(y, want)
    for got, expected in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("name", ["ncsn pair", "adm"])
def test_block_is_captured_in_a_cuda_graph(name):
    """Forward and backward; a replay on other numbers gives what running gives."""
    run, inputs = block_call(name, fuse(BLOCKS[name]()))
    inputs = [t.requires_grad_() for t in inputs]

    def step() -> tuple[Tensor, ...]:
        y = run(*inputs)
        return (y, *torch.autograd.grad(y.square().sum(), inputs))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(-0.5)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["ncsn pair", "adm attention"])
def test_block_under_autocast(name):
    """Convolutions in 16 bits, norms in float32: the fused block is as near to the float32 one as PyTorch's."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, a GPU rounds
    layer = BLOCKS[name]()
    run, inputs = block_call(name, layer)
    want = run(*inputs)
    maps = 2 if name.endswith("pair") else 1
    inputs = [*(x.to(dtype) for x in inputs[:maps]), *inputs[maps:]]
    with torch.no_grad(), torch.autocast(DEVICE, dtype):
        with plain_pytorch(layer):
            eager = run(*inputs)
        fuse(layer)
        got = run(*inputs)
    assert got.dtype == eager.dtype == dtype
    # of so few values the largest error is a throw of dice
    assert (got - want).norm() <= 1.5 * (eager - want).norm()


@pytest.mark.parametrize("level", [0, 1])
def test_statistics_go_from_block_to_block(level):
    """Every norm that reads a block's result reads it with its statistics; frozen or not, gradients are the same."""
    torch.manual_seed(0)
    net = SongUNet(8, 1, 1, model_channels=16, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], dropout=0.0)
    net.requires_grad_(True).to(DEVICE)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    freeze(net, level)
    x, noise = torch.randn(1, 1, 8, 8, device=DEVICE), torch.tensor([0.3], device=DEVICE)
    weights = [p for p in net.parameters() if p.requires_grad]
    given = {}

    def note(module, args, kwargs):
        maps = args[0] if isinstance(args[0], tuple) else args[:1]
        known = kwargs.get("statistics")
        given[module] = [s is not None for s in (known if isinstance(known, tuple) else (known,) * len(maps))]

    def run():
        y = net(x, noise)
        return y, torch.autograd.grad(y.square().sum(), weights)

    with plain_pytorch(net):
        want, want_gradients = run()
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in net.modules() if hasattr(m, "num_groups")]
    fuse(net)
    got, gradients = run()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    blocks = {name: layer for name, layer in net.named_modules() if isinstance(layer, UNetBlock)}
    assert given[blocks["enc.8x8_block0"].norm0] == [False]  # a convolution's result
    assert given[blocks["enc.4x4_block0"].norm0] == [True]
    assert given[blocks["enc.4x4_block0"].norm2] == [True]
    assert given[blocks["dec.4x4_block0"].norm0] == [True, True]
    assert given[net.dec["8x8_aux_norm"]] == [True]


# --- twenty steps; those of the whole training loop are in test_fused_training.py


def float64(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


class Stack(nn.Module):
    """Blocks as NCSN++ has them, from noise to an image: an encoder's, one with attention, a decoder's on a pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        options = {"adaptive": False}
        self.enter = nn.Conv2d(3, width, 1)
        self.enc = block(width, width, 16, **options)
        self.mid = block(width, width, 16, num_heads=1, **options)
        self.dec = block(2 * width, width, 16, **options)
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        emb = torch.linspace(-1, 1, 16, dtype=z.dtype, device=z.device)[None]
        x = skip = self.enter(z)
        x, s = self.enc(x, emb, return_statistics=True)
        x, s = self.mid(x, emb, statistics=s, return_statistics=True)
        return self.leave(self.dec((x, skip), emb, statistics=(s, None)))


class Judge(nn.Module):
    """A discriminator that has a second derivative: enough to pull the stack somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.SiLU(), nn.Conv2d(32, 1, 1))

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [[self.layers(x).flatten(1)]]


def distill(make, kind: str, images: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The weights of generator and judge before and after STEPS iterations of GDD-I, as one float64 vector each."""
    torch.manual_seed(0)
    generator, judge = (net.to(DEVICE) for net in make())
    freeze(generator, 1)
    generator.to(memory_format=torch.channels_last)
    plain = contextlib.ExitStack()
    if kind == "fused":
        generator, judge = fuse(generator), fuse(judge)
    else:
        for net in (generator, judge):
            plain.enter_context(plain_pytorch(net))
    convert = (lambda t: t) if kind != "float64" else float64
    if kind == "float64":
        generator, judge = generator.double(), judge.double()
    trained = [p for net in (generator, judge) for p in net.parameters() if p.requires_grad]
    before = torch.cat([p.detach().double().flatten() for p in trained])
    # GDD's Adam but for eps: gradients that are zero but for rounding (biases before batch norms) stay without effect
    g_adam, d_adam = (
        torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr, betas=(0.0, 0.99), eps=1e-4)
        for net, lr in ((generator, 1e-4), (judge, 1e-3))
    )
    numbers = torch.Generator().manual_seed(1)
    with plain:
        for step in range(STEPS):
            z, real = (convert(torch.randn(images, generator=numbers).to(DEVICE)) for _ in range(2))
            fake = generator(z)
            generator_loss(judge(fake), "heads", len(z)).backward()
            g_adam.step()
            d_adam.zero_grad()
            discriminator_loss(judge(fake.detach()), judge(real), "heads", len(z)).backward()
            if step % 4 == 3:
                real = real.requires_grad_()
                r1_penalty(real, judge(real)).mean().backward()
            d_adam.step()
            g_adam.zero_grad()
            d_adam.zero_grad()
    return before, torch.cat([p.detach().double().flatten() for p in trained])


@pytest.mark.parametrize(
    ("make", "images"),
    [
        pytest.param(lambda: (Stack(16), Judge()), (1, 3, 4, 4), id="narrow blocks"),
        pytest.param(lambda: (Stack(256), Judge()), (2, 3, 8, 8), id="blocks of real width", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_of_blocks(make, images):
    before, exact = distill(make, "float64", images)
    eager, fused = (distill(make, kind, images)[1] for kind in ("eager", "fused"))
    moved, eager_error, error = ((t - exact).norm().item() for t in (before, eager, fused))
    assert moved > 20 * eager_error, "eager float32 itself does not follow float64"
    assert error <= 2 * eager_error, f"distance {error:.3g}, and eager torch's is {eager_error:.3g}"
