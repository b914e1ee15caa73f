"""Cases of whole networks and their pieces: generators, U-Net blocks, frozen backbones."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.layer_calls import BACKBONES, build, call
from benchmarks.counts.step_kernels import count_kernels
from benchmarks.harness.case import COMPILED, Bench, Case
from benchmarks.harness.checks import Closeness, tensors
from benchmarks.harness.timing import Call
from benchmarks.peers import exported
from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockBlock, StockGenerator
from gdd_fast.distill.freeze import freeze
from gdd_fast.engine.engines import make_engine
from gdd_fast.engine.fold import fold, make_target
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.sampling.sampler import one_step

FLOOR = 1e-3
"""A relative error in norm that is never too large; beyond it, twice plain PyTorch's in the same type is."""
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_IN_TF32 = ("stock", "gdd_fast", "OneStepGenerator:eager", "graph", "gdd_fast graph", *COMPILED)
"""Peers of a float32 generator that convolve in TF32 on a GPU: by choice, or as PyTorch does unless told not to."""
_BLOCKS = (("ncsnpp-32", "enc.16x16_block1"), ("ncsnpp-32", "dec.32x32_block0"), ("adm-64", "enc.32x32_block1"))


def network_cases(full: bool) -> list[Case]:
    """On a CPU NCSN++ 32 and the demo's network at batch 1 and 4, a block, lite0; what compiles comes last.

    `full`: more batches and networks.
    """
    if not full:
        fp32, bf16, compiled = torch.float32, torch.bfloat16, ("compile",)
        return [
            generator_case("ncsnpp-32", 1, bf16),
            block_case(*_BLOCKS[1], 2, torch.float32),
            backbone_case("tf_efficientnet_lite0", 4, torch.float32, resolution=64),
            *(generator_case("demo", n, dtype, compiled=compiled) for n in (1, 4) for dtype in (fp32, bf16)),
            *(generator_case("ncsnpp-32", n, fp32, compiled=compiled) for n in (1, 4)),
            generator_case("ncsnpp-32", 4, bf16, compiled=compiled),
        ]
    bf16 = torch.bfloat16
    cases = [generator_case("ncsnpp-32", n, bf16) for n in (256, 1, 16)]
    cases += [generator_case("ncsnpp-32", n, torch.float32) for n in (256, 1)]  # the type of exported networks
    others = [generator_case(name, n, bf16) for n in (256, 1, 16) for name in ("adm-64", "ncsnpp-64")]
    backbones = [backbone_case(name, 64, bf16) for name in BACKBONES]
    blocks = [block_case(*block, 64, bf16) for block in _BLOCKS]
    return [*cases, *others[:3], *backbones, *blocks, *others[3:]]


def compiled_cases() -> list[Case]:
    """What torch.compile takes a minute or more to get ready on a GPU, the most telling first; no other peers.

    The rows belong to the cases of the same names in `network_cases(True)`.
    """
    bf16 = torch.bfloat16

    def generators(*wanted: tuple[str, int, str]) -> list[Case]:
        return [generator_case(name, n, bf16, ready=False, compiled=(peer,)) for name, n, peer in wanted]

    return [
        *generators(("ncsnpp-32", 256, "compile"), ("ncsnpp-32", 1, "compile")),
        *generators(("ncsnpp-32", 1, "max-autotune"), ("ncsnpp-32", 256, "max-autotune")),
        *(block_case(*block, 64, bf16, compiled=True) for block in _BLOCKS),
        *(backbone_case(name, 64, bf16, compiled=True) for name in BACKBONES),
        *generators(("adm-64", 256, "compile"), ("ncsnpp-32", 16, "compile")),
        *generators(("ncsnpp-32", 256, "OneStepGenerator:compile")),
    ]


def generator_case(
    name: str, batch: int, dtype: torch.dtype, *, ready: bool = True, compiled: tuple[str, ...] = ()
) -> Case:
    """One-step sampling, latents to float images. On a CPU a half-precision case has the best of float32 beside it.

    `ready` has the peers that run at once; `compiled` names those wanted that have to be compiled: "compile",
    "max-autotune", "OneStepGenerator:compile".
    """
    build = partial(_generator, name, batch, dtype, ready, compiled)
    return Case("generator", f"{name} batch {batch} {_NAMES[dtype]}", build, larger=batch > 1)


def _generator(
    name: str, batch: int, dtype: torch.dtype, ready: bool, compiled: tuple[str, ...], device: torch.device
) -> Bench:
    net = peers.make_generator(name, device).requires_grad_(False)
    z = torch.randn((batch, net.img_channels, net.img_resolution, net.img_resolution), device=device)
    labels = peers.one_of_each_class(batch, net.label_dim, device)
    classes = None if labels is None else labels.argmax(1)
    gpu = device.type == "cuda"
    with torch.no_grad():
        # chooses the algorithms for the peers of this type as well, most of which run float32 in TF32 on a GPU
        with peers.tf32(gpu and dtype == torch.float32, trials=True):
            eager = one_step(StockGenerator(net, BEST, dtype), z, labels)
        with peers.tf32(False, trials=dtype == torch.float32):  # they take seconds
            expected = one_step(StockGenerator(net, OFFICIAL, torch.float32), z, labels)
    check = Closeness(expected, FLOOR, eager)

    def stock(mode: str | None = None, own: torch.dtype = dtype) -> Call:
        model = peers.stock_generator(net, BEST, own)
        if mode is not None:
            model = torch.compile(model, dynamic=False, mode=None if mode == "compile" else mode)
        return peers.sampling(model, z, labels, tf32=True)

    def ours() -> Call:
        return peers.sampling(peers.our_generator(net, dtype), z, labels, tf32=None)

    def engine(kind: str) -> Call:
        generator = OneStepGenerator.from_network(net, device=device, dtype=dtype, engine=kind)

        def call() -> Tensor:
            """The public call, with its looks at classes and values, on the latents of all the peers."""
            return generator(batch, classes, latents=z, output="float").permute(0, 3, 1, 2)

        return peers.under_tf32(call, None)

    def in_channels_last() -> Call:
        """What `OneStepGenerator:graph` runs, in the memory format that float32 without TF32 is not given on a GPU."""
        target = replace(make_target(device, dtype), layout=torch.channels_last)
        network, conditioning = fold(net, target, net.sigma_init)
        run = make_engine("graph", network, device)
        return lambda: run(z, None if conditioning is None else conditioning(classes))

    official = StockGenerator(net, OFFICIAL, dtype)
    makers: dict[str, Callable[[], Call]] = {
        "official": lambda: peers.sampling(official, z, labels, tf32=False),
        "stock": stock,
        "gdd_fast": ours,
    }
    makers |= {f"OneStepGenerator:{kind}": partial(engine, kind) for kind in ("eager", "graph")[: 1 + gpu]}
    if gpu:
        makers |= {"graph": lambda: peers.graphed(stock()), "gdd_fast graph": lambda: peers.graphed(ours())}
        if dtype == torch.float32:
            makers["engine graph in channels_last"] = in_channels_last
    else:
        folder = tempfile.TemporaryDirectory()
        file = cache(lambda: exported.write_generator(net, folder.name))
        precision = "f32" if dtype == torch.float32 else "bf16"
        makers["openvino"] = lambda: exported.openvino(file(), z, classes, precision)
        if dtype == torch.float32:
            makers["onnxruntime"] = lambda: exported.onnxruntime(file(), z, classes)
        else:
            makers["stock fp32"] = partial(stock, None, torch.float32)
    slow: dict[str, Callable[[], Call]] = {mode: partial(stock, mode) for mode in COMPILED}
    slow["OneStepGenerator:compile"] = partial(engine, "compile")
    makers = (makers if ready else {}) | {peer: slow[peer] for peer in compiled}
    weights = sum(p.numel() for p in net.parameters()) * (torch.finfo(dtype).bits // 8)
    with torch.no_grad():
        flops = count_kernels(lambda: _meta_generator(net, batch)).flop
    return Bench(
        makers,
        check.check,
        bytes=weights + 2 * 4 * z.numel(),
        flops=flops,
        images=batch,
        precision=_NAMES[dtype],
        precisions={"stock fp32": "fp32"} | dict.fromkeys(_IN_TF32 if gpu and dtype == torch.float32 else (), "tf32"),
        keep=None if gpu else folder,
    )


def _meta_generator(net: GDDPrecond, batch: int) -> None:
    meta = StockGenerator(copy.deepcopy(net).to("meta"), BEST, torch.float32)
    z = torch.empty((batch, net.img_channels, net.img_resolution, net.img_resolution), device="meta")
    one_step(meta, z, torch.empty((batch, net.label_dim), device="meta") if net.label_dim else None)


def block_case(name: str, block: str, batch: int, dtype: torch.dtype, *, compiled: bool = False) -> Case:
    """One U-Net block of a GDD-I generator, forward and backward to its input and to the weights that train."""
    title = f"{name} {block} {batch} {_NAMES[dtype]}"
    return Case("U-Net block forward+backward", title, partial(_block, name, block, batch, dtype, compiled))


def _block(name: str, block: str, batch: int, dtype: torch.dtype, compiled: bool, device: torch.device) -> Bench:
    net = peers.make_generator(name, device)
    freeze(net, 1)
    ours = net.model.get_submodule(block)
    shapes, emb_channels = _block_inputs(name, block)
    maps = [torch.randn((batch, *shape), device=device) for shape in shapes]
    emb = torch.randn((batch, emb_channels), device=device)
    wanted = [p for p in ours.parameters() if p.requires_grad]

    def run(layer: nn.Module, kind: torch.dtype, layout: torch.memory_format) -> Call:
        leaves = [m.to(kind).contiguous(memory_format=layout).requires_grad_() for m in maps]
        e = emb if layer is ours else emb.to(kind)
        cotangent = torch.ones((), device=device, dtype=kind)

        def call() -> list[Tensor]:
            x = leaves[0] if len(leaves) == 1 else tuple(leaves) if layer is ours else torch.cat(leaves, 1)
            y = layer(x, e)
            return [y.detach(), *torch.autograd.grad(y, [*leaves, *wanted], cotangent.expand_as(y))]

        return call

    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    official, best = StockBlock(ours, OFFICIAL), StockBlock(ours, BEST)
    with peers.tf32(False, trials=True):  # chooses the algorithms for the peers as well
        expected = run(official, torch.float32, contiguous)()
        check = Closeness(expected, FLOOR, run(best, dtype, channels_last)())
    makers = {
        "official": lambda: peers.under_tf32(run(official, dtype, contiguous), False),
        "stock": lambda: peers.under_tf32(run(best, dtype, channels_last), True),
        "gdd_fast": lambda: peers.under_tf32(run(ours, dtype, channels_last), None),
    }
    if compiled:
        layer = torch.compile(best, dynamic=False)
        makers = {"compile": lambda: peers.under_tf32(run(layer, dtype, channels_last), True)}
    return Bench(makers, check.check, precision=_NAMES[dtype], images=batch)


def _block_inputs(name: str, block: str) -> tuple[list[tuple[int, ...]], int]:
    """Shapes (C, H, W) of the maps that the block is called with, and the width of the embedding."""
    net, seen = build(name), []

    def hook(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(([tuple(t.shape[1:]) for t in tensors(inputs[0])], inputs[1].shape[1]))

    net.model.get_submodule(block).register_forward_pre_hook(hook)
    with torch.no_grad():
        call(net)
    return seen[0]


def backbone_case(name: str, batch: int, dtype: torch.dtype, *, resolution: int = 224, compiled: bool = False) -> Case:
    """A frozen backbone: four maps and the gradient of its input, as the generator step needs."""
    title = f"{name} {batch}x3x{resolution}² {_NAMES[dtype]}"
    return Case("backbone forward+input gradient", title, partial(_backbone, name, batch, dtype, resolution, compiled))


def _backbone(
    name: str, batch: int, dtype: torch.dtype, resolution: int, compiled: bool, device: torch.device
) -> Bench:
    x = torch.randn((batch, 3, resolution, resolution), device=device)

    def run(
        net: Callable[[Tensor], Any], kind: torch.dtype = dtype, layout: torch.memory_format = torch.channels_last
    ) -> Call:
        leaf = x.to(kind, memory_format=layout).requires_grad_()

        def call() -> list[Tensor]:
            maps = net(leaf)
            ones = [torch.ones((), dtype=m.dtype, device=device).expand_as(m) / m[0].numel() for m in maps]
            return [*(m.detach() for m in maps), *torch.autograd.grad(maps, [leaf], ones)]

        return call

    def as_published() -> Call:
        net = peers.plain(peers.make_backbone(name, resolution, device, folded=False))
        return run(net, torch.float32, torch.contiguous_format)

    def folded(kind: Callable[[nn.Module], Any]) -> nn.Module:
        net = kind(peers.make_backbone(name, resolution, device, folded=True))
        return net.to(dtype=dtype, memory_format=torch.channels_last)

    def stock(compile_it: bool = False) -> Call:
        net = folded(peers.plain)
        return peers.under_tf32(run(torch.compile(net, dynamic=False) if compile_it else net), True)

    with peers.tf32(False, trials=True):
        check = Closeness(as_published()(), FLOOR, stock()())
    makers: dict[str, Callable[[], Call]] = {
        "official fp32": lambda: peers.under_tf32(as_published(), False),
        "stock": stock,
        "gdd_fast": lambda: peers.under_tf32(run(folded(lambda net: net)), None),
    }
    if compiled:
        makers = {"compile": partial(stock, True)}
    flops = count_kernels(lambda: _meta_backbone(name, batch, resolution)).flop
    return Bench(makers, check.check, flops=flops, precision=_NAMES[dtype], precisions={"official fp32": "fp32"})


def _meta_backbone(name: str, batch: int, resolution: int) -> None:
    net = peers.plain(peers.make_backbone(name, resolution, torch.device("cpu"), folded=True)).to("meta")
    maps = net(torch.empty((batch, 3, resolution, resolution), device="meta", requires_grad=True))
    torch.autograd.backward(maps, [torch.empty_like(m) for m in maps])
