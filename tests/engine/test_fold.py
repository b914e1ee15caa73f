"""Folding: the same function as the plain network, in every architecture, layout of operators and precision."""

import dataclasses

import pytest
import torch
from edm_reference import SIZE, SMALL, fill
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gdd_fast.engine import folded_layers as folded
from gdd_fast.engine.fold import Conditioning, fold, make_target
from gdd_fast.engine.folded_layers import Target
from gdd_fast.engine.folded_unet import FoldedUNet
from gdd_fast.errors import BackendError, ConfigError
from gdd_fast.layers.skip_pair import Pair, Statistics
from gdd_fast.models.edm import ncsnpp
from gdd_fast.models.precond import EDMPrecond, GDDPrecond
from gdd_fast.ops._memory_format import channel_statistics_ref
from gdd_fast.ops.group_norm_silu import group_norm_silu_ref
from gdd_fast.ops.residual import residual_ref

CPU = torch.device("cpu")
SIGMA = 80.0
HALF_OTHERWISE = [(torch.bfloat16, "gpu"), (torch.float16, "cpu")]
ARCHITECTURES = pytest.mark.parametrize("name", SMALL)


def network(name: str, cls: type[EDMPrecond] = GDDPrecond) -> EDMPrecond:
    return fill(cls(SIZE, 3, **SMALL[name])).requires_grad_(False)


def latents(n: int = 3) -> Tensor:
    return torch.randn((n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def classes(net: EDMPrecond, n: int = 3) -> Tensor | None:
    return torch.arange(n) * 3 % net.label_dim if net.label_dim else None


def one_hot(net: EDMPrecond, c: Tensor | None) -> Tensor | None:
    return None if c is None else torch.nn.functional.one_hot(c, net.label_dim).float()


def run(engine: tuple[FoldedUNet, Conditioning | None], z: Tensor, labels: Tensor | None) -> Tensor:
    unet, conditioning = engine
    with torch.no_grad():
        return unet(z, None if conditioning is None else conditioning(labels))


@torch.no_grad()
def plain(net: EDMPrecond, z: Tensor, labels: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """D(sigma z; sigma) as the network itself has it, in `dtype`; float64 throughout if that is asked for."""
    net.dtype = dtype if dtype != torch.float64 else torch.float32
    try:
        if dtype != torch.float64:
            return net(z * SIGMA, SIGMA, labels)
        return double(net, z.double(), labels)
    finally:
        net.dtype = torch.float32


def double(net: EDMPrecond, z: Tensor, labels: Tensor | None) -> Tensor:
    """The formula of gdd_fast.models.precond in float64."""
    sd, offset = net.sigma_data, SIGMA - net.sigma_eps
    root = (SIGMA**2 + sd**2) ** 0.5
    noise = torch.tensor([SIGMA]).log() / 4  # the embedding's frequencies are for float32
    model = net.model
    emb = model.embed(noise, labels, None, batch=len(z)).double()
    model = model.double()
    original, model.embed = model.embed, lambda *_, **__: emb
    try:
        f = model(z * (SIGMA / root), noise, labels)
    finally:
        del model.embed
        assert model.embed == original
        model.float()
    return sd**2 / (offset**2 + sd**2) * SIGMA * z + offset * sd / root * f


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def targets(dtype: torch.dtype = torch.float32) -> dict[str, Target]:
    """Every way to run, those of a GPU among them, by operators that the CPU has too."""
    target = make_target(CPU, dtype)
    return {
        "cpu": target,
        "definitions": make_target(CPU, dtype, "torch"),
        "traced": make_target(CPU, dtype, traced=True),
        "gpu": dataclasses.replace(target, convolve="plain", late_bias=True),
        "gpu, full fp32": dataclasses.replace(
            target, convolve="plain", late_bias=True, layout=torch.contiguous_format, winograd=False, small=False
        ),
        "without AVX2": dataclasses.replace(
            target, convolve="plain", layout=torch.contiguous_format, winograd=False, small=False
        ),
    }


@ARCHITECTURES
@pytest.mark.parametrize("way", targets())
def test_equals_the_network_in_float32(name: str, way: str) -> None:
    net = network(name)
    labels = classes(net)
    y = run(fold(net, targets()[way], SIGMA), latents(), labels)
    assert y.dtype == torch.float32
    assert error(y, plain(net, latents(), one_hot(net, labels)).double()) <= 1e-5


@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [(name, torch.bfloat16, "cpu") for name in SMALL]
    + [(name, dtype, way) for name in ("ncsnpp", "adm_cond") for dtype, way in HALF_OTHERWISE],
    ids=str,
)
def test_half_precision_is_as_accurate_as_the_networks_own(name: str, dtype: torch.dtype, way: str) -> None:
    net = network(name)
    labels = classes(net)
    want = plain(net, latents(), one_hot(net, labels), torch.float64)
    eager = error(plain(net, latents(), one_hot(net, labels), dtype), want)
    assert 0 < error(run(fold(net, targets(dtype)[way], SIGMA), latents(), labels), want) <= 2 * eager


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["ncsnpp", "adm_cond"])
def test_with_the_kernels_of_a_gpu(name: str, layout: torch.memory_format) -> None:
    """Under Triton's interpreter, residual included; shapes stay small because it is slow."""
    pytest.importorskip("triton")
    net = fill(
        GDDPrecond(8, 3, **{**SMALL[name], "model_channels": 16, "channel_mult": [1, 2], "attn_resolutions": []})
    )
    z = latents(1)[:, :, :8, :8].contiguous()
    target = dataclasses.replace(
        make_target(CPU, torch.float32, "triton"), convolve="plain", late_bias=True, layout=layout
    )
    assert (target.norm, target.residual) == ("triton", "triton")
    labels = classes(net, 1)
    assert error(run(fold(net, target, SIGMA), z, labels), plain(net, z, one_hot(net, labels)).double()) <= 1e-5


@pytest.mark.parametrize("levels", [None, [1] * SIZE.bit_length()], ids=["", "down to one pixel"])
@ARCHITECTURES
@pytest.mark.parametrize("way", ["gpu", "gpu, full fp32"])
def test_every_map_has_the_layout_of_the_target(name: str, way: str, levels: list[int] | None) -> None:
    """One layer that changed it would make all after it compute in the slow one."""
    net = network(name) if levels is None else fill(GDDPrecond(SIZE, 3, **{**SMALL[name], "channel_mult": levels}))
    target = dataclasses.replace(targets()[way], small=False, winograd=False)
    unet, conditioning = fold(net, target, SIGMA)
    maps: list[Tensor] = []
    for layer in unet.modules():
        if not isinstance(layer, FoldedUNet):
            layer.register_forward_hook(lambda _layer, _inputs, made: maps.extend(t for t in tree_leaves(made)))
    run((unet, conditioning), latents(), classes(net))
    maps = [t for t in maps if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] > 1 and t.shape[2] > 1]
    assert levels is None or min(t.shape[2] for t in maps) == 2, "no map of two pixels, so none of one either"
    assert maps and all(t.is_contiguous(memory_format=target.layout) for t in maps)


@ARCHITECTURES
def test_statistics_travel_with_their_maps(name: str, monkeypatch) -> None:
    """Norms trust them: they have to be of the very map that is read, and every map of a fused residual has them."""
    made: list[Tensor] = []
    read = 0

    def add(*arguments, statistics: bool, backend: str) -> tuple[Tensor, Tensor]:
        assert statistics and backend == "triton"
        made.append(residual_ref(*arguments))
        return made[-1], channel_statistics_ref(made[-1])

    def norm(x: Tensor | Pair, *arguments, statistics: Statistics, backend: str, **options) -> Tensor:
        nonlocal read
        for part, given in zip(x, statistics, strict=True) if isinstance(x, tuple) else ((x, statistics),):
            assert (given is not None) == any(part is map for map in made)
            if given is not None:
                read += 1
                torch.testing.assert_close(given, channel_statistics_ref(part))
        return group_norm_silu_ref(x, *arguments, **options)

    monkeypatch.setattr(folded, "residual", add)
    monkeypatch.setattr(folded, "group_norm_silu", norm)
    net = network(name)
    ways = {"convolve": "plain", "late_bias": True, "norm": "triton", "residual": "triton", "statistics": True}
    target = dataclasses.replace(make_target(CPU, torch.float32), **ways)
    labels = classes(net)
    y = run(fold(net, target, SIGMA), latents(), labels)
    assert error(y, plain(net, latents(), one_hot(net, labels)).double()) <= 1e-5
    assert 0 < len(made) < read, "several norms read a skip"


@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_soft_labels(name: str) -> None:
    net = network(name)
    folded = fold(net, make_target(CPU, torch.float32), SIGMA)
    soft = torch.rand((3, net.label_dim), generator=torch.Generator().manual_seed(1))
    soft[0] = 0  # "no class"
    assert error(run(folded, latents(), soft), plain(net, latents(), soft).double()) <= 1e-5


def test_soft_labels_never_leave_their_device() -> None:
    net = network("adm_cond")
    _, conditioning = fold(net, make_target(CPU, torch.float32), SIGMA)
    rows = conditioning(torch.empty(3, net.label_dim, device="meta"))
    assert (rows.device.type, rows.shape) == ("meta", (3, conditioning.table.shape[1]))
    assert conditioning(torch.eye(net.label_dim)).device == CPU


def test_every_class_has_its_row() -> None:
    net = network("adm_cond")
    _, conditioning = fold(net, make_target(CPU, torch.float32), SIGMA)
    want = conditioning(torch.eye(net.label_dim))
    torch.testing.assert_close(conditioning(torch.arange(net.label_dim)), want)
    assert len(want.unique(dim=0)) == net.label_dim


def test_edms_preconditioning_and_other_noise_levels() -> None:
    net = network("ddpmpp", EDMPrecond)
    for sigma in (0.7, 80.0):
        y = run(fold(net, make_target(CPU, torch.float32), sigma), latents(), None)
        with torch.no_grad():
            assert error(y, net(latents() * sigma, sigma).double()) <= 1e-5


def test_the_network_is_left_as_it_was_and_not_looked_at_again() -> None:
    net = network("ncsnpp_cond").train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    engine = fold(net, make_target(CPU, torch.float32), SIGMA)
    assert net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    soft = torch.full((3, net.label_dim), 0.1)
    first = [run(engine, latents(), labels) for labels in (classes(net), soft)]
    for t in net.state_dict().values():
        t.zero_()
    for y, labels in zip(first, (classes(net), soft), strict=True):
        assert torch.equal(run(engine, latents(), labels), y)


def test_nothing_is_written_to_the_latents_and_calls_repeat() -> None:
    net = network("skip")
    engine, z = fold(net, make_target(CPU, torch.float32), SIGMA), latents()
    kept = z.clone()
    assert torch.equal(run(engine, z, None), run(engine, z, None))
    assert torch.equal(z, kept)


def test_what_cannot_be_folded() -> None:
    net = fill(GDDPrecond(SIZE, 3, **ncsnpp(model_channels=16, channel_mult=[1], num_blocks=1)))
    for sigma in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="sigma"):
            fold(net, make_target(CPU, torch.float32), sigma)
    with pytest.raises(BackendError, match="unknown"):
        make_target(CPU, torch.float32, "fast")
    with pytest.raises(BackendError, match="CUDA"):
        make_target(CPU, torch.float32, "cuda")
