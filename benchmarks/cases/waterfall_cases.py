"""Waterfalls: one technique switched on after another, for an iteration with R1's share, and for sampling.

Each step keeps what the ones before it brought. All are compared with the public code's settings in float32 before
they are timed, like any peer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases.network_cases import FLOOR
from benchmarks.cases.training_cases import settings_bench
from benchmarks.harness.case import Bench, Case
from benchmarks.harness.checks import Closeness
from benchmarks.harness.timing import Call
from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator, Style
from benchmarks.peers.training import OFFICIAL_SETTINGS, Settings, Setup
from gdd_fast.engine.one_step import OneStepGenerator


def waterfall_cases(full: bool) -> list[Case]:
    """Training of the demo, `full` of the CIFAR-10 preset; sampling of NCSN++ 32."""
    setup, batch = (Setup("cifar10-uncond-gdd-i", 128), 16) if full else (Setup("demo", 16), 1)
    training = lambda device: settings_bench("iteration", setup, training_steps(device), device)
    title = f"{setup.preset} batch {setup.batch}"
    return [Case("waterfall training", title, training, larger=True), sampling_case("ncsnpp-32", batch)]


def sampling_case(name: str, batch: int) -> Case:
    """One step of a generator of peers/networks.py."""
    return Case("waterfall sampling", f"{name} batch {batch}", partial(_sampling, name, batch), larger=True)


def training_steps(device: torch.device) -> dict[str, Settings]:
    """Name of the technique -> the settings with it and all before it."""
    found: dict[str, Settings] = {}
    gpu = device.type == "cuda"
    settings = OFFICIAL_SETTINGS if gpu else replace(OFFICIAL_SETTINGS, generator_dtype=torch.float32)
    bf16 = {"discriminator_dtype": torch.bfloat16}
    steps: list[tuple[str, dict]] = [
        ("public settings", {}),
        ("channels_last", {"channels_last": True}),
        ("fused Adam, foreach average", {"optimizer": "fused"}),
        *([("TF32", {"tf32": True}), ("bf16 discriminator", bf16)] if gpu else []),
        ("folded batch norms", {"features": "stock"}),
        ("fused attention, norms in one type", {"unet": "stock"}),
        ("gdd_fast: frozen backbones", {"features": "gdd_fast"}),
        ("gdd_fast: U-Net", {"unet": "gdd_fast"}),
        ("gdd_fast: Adam and average in one", {"optimizer": "adam_ema"}),
        *([] if gpu or not _fast_bf16() else [("bf16", {"generator_dtype": torch.bfloat16, **bf16})]),
    ]
    for name, change in steps:
        settings = replace(settings, **change)
        found[name] = settings
    return found


def _fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX)."""
    return torch.backends.cpu.get_cpu_capability() != "NO AVX" and torch.cpu._is_amx_tile_supported()


def _sampling(name: str, batch: int, device: torch.device) -> Bench:
    net = peers.make_generator(name, device).requires_grad_(False)
    z = torch.randn((batch, net.img_channels, net.img_resolution, net.img_resolution), device=device)
    gpu = device.type == "cuda"

    sampling = partial(peers.sampling, z=z, tf32=False)  # all alike: TF32 is none of the techniques
    expected = sampling(StockGenerator(net, OFFICIAL, torch.float32))()

    def stock(style: Style, layout: torch.memory_format, dtype: torch.dtype, cast: bool = False) -> Call:
        return sampling(peers.stock_generator(net, style, dtype, layout, cast=cast))

    def engine(kind: str) -> Call:
        generator = OneStepGenerator.from_network(net, device=device, dtype=last, engine=kind)
        return peers.under_tf32(lambda: generator.run(z), False)

    nchw, nhwc, bf16 = torch.contiguous_format, torch.channels_last, torch.bfloat16
    first = bf16 if gpu else torch.float32
    last = bf16 if gpu or _fast_bf16() else torch.float32
    steps: dict[str, Callable[[], Call]] = {
        "public settings": partial(stock, OFFICIAL, nchw, first),
        "channels_last": partial(stock, OFFICIAL, nhwc, first),
        "fused attention, norms in one type": partial(stock, BEST, nhwc, first),
    }
    if last != first:
        steps["bf16"] = partial(stock, BEST, nhwc, last)
    steps["weights cast once"] = partial(stock, BEST, nhwc, last, True)
    steps["gdd_fast: operators"] = lambda: sampling(peers.our_generator(net, last))
    steps["gdd_fast: folded"] = partial(engine, "eager")
    if gpu:
        steps["gdd_fast: folded, CUDA graph"] = partial(engine, "graph")
    closeness = Closeness(expected, FLOOR, sampling(StockGenerator(net, BEST, last))())
    return Bench(steps, closeness.check, images=batch)
