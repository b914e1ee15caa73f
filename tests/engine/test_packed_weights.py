"""Folded networks on a CPU: a weight is brought to the order that it is convolved in once, by the first call."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from edm_reference import SMALL, fill

from gdd_fast.engine.fold import fold, make_target
from gdd_fast.engine.folded_layers import Convolution
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import ConfigError
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ops.winograd_conv2d import takes

CPU = torch.device("cpu")
NEEDS_PACKING = pytest.mark.skipif(
    make_target(CPU, torch.float32).convolve != "packed", reason="this processor convolves without packed weights"
)
NEEDS_WINOGRAD = pytest.mark.skipif(
    not takes(torch.empty(32, 16, 3, 3)), reason="there is no kernel of winograd_conv2d for this processor"
)
CONVOLUTIONS = """
import dataclasses, sys, torch
from gdd_fast.engine.fold import make_target
from gdd_fast.engine.folded_layers import Convolution
threads, pad = int(sys.argv[1]), {3: 1, 1: 0}
torch.set_num_threads(threads)
target = dataclasses.replace(make_target(torch.device("cpu"), torch.float32), winograd=False, small=False)
shapes = [(128, 32, 3), (256, 32, 3), (256, 16, 3), (512, 16, 3), (256, 8, 3), (512, 8, 1)]
layers = [(Convolution(torch.randn(256, c, k, k), torch.zeros(256), pad[k], target), c, size) for c, size, k in shapes]
downs = {size: Convolution(torch.randn(256, 512, 1, 1), None, 0, target) for size in (8, 16)}
with torch.no_grad():
    for call in range(2):
        print("call", call, flush=True)
        for layer, channels, size in layers:
            x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
            y = layer(x)
            if channels == 512:
                downs[size].add_to(y, x)
"""


@NEEDS_PACKING
@pytest.mark.parametrize("processor", ["AVX2", "DEFAULT"])
def test_a_second_call_reorders_no_weight(processor: str) -> None:
    """By oneDNN's own log. Weights packed for no shape in particular took it 74 reorders a network, AVX2, 2 threads."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": processor, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", CONVOLUTIONS, "2"]
    log = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    second = log.partition("call 1")[2].splitlines()
    convolutions = [line for line in second if ",exec,cpu,convolution," in line]
    assert len(convolutions) == 8
    assert [line for line in second if ",exec,cpu,reorder," in line] == []


@NEEDS_PACKING
def test_a_weight_is_packed_once_a_shape() -> None:
    layer = Convolution(torch.randn(4, 3, 3, 3), torch.randn(4), 1, make_target(CPU, torch.float32))
    packed = layer.packed
    shapes = [torch.Size((n, 3, size, size)) for n, size in ((1, 8), (1, 8), (2, 8), (1, 16))]
    weights = [packed(layer.weight, 1, shape) for shape in shapes]
    assert weights[0] is weights[1]
    assert len({id(weight) for weight in weights}) == 3


def test_images_do_not_depend_on_the_batches_before() -> None:
    torch.manual_seed(0)
    net = fill(GDDPrecond(8, 3, **SMALL["ncsnpp"])).requires_grad_(False)
    unet, _ = fold(net, make_target(CPU, torch.float32))
    z = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        first = unet(z, None)
        for part in (z[:1], z[:2], z):
            torch.testing.assert_close(unet(part, None), first[: len(part)], rtol=1e-5, atol=1e-4)


def wide_network() -> GDDPrecond:
    """Of 32 channels: most of its 3x3 convolutions have a kernel of winograd_conv2d."""
    return fill(GDDPrecond(16, 3, **SMALL["ncsnpp"] | {"model_channels": 32})).requires_grad_(False)


@NEEDS_WINOGRAD
def test_large_maps_are_convolved_by_winograds_method_and_small_ones_are_not() -> None:
    """A network at 16x16 pixels: at its full resolution, of one image too, and below it where the batch is large."""
    net = wide_network()
    z = torch.randn(5, 3, 16, 16)
    fast = fold(net, make_target(CPU, torch.float32))[0]
    slow = fold(net, dataclasses.replace(make_target(CPU, torch.float32), winograd=False))[0]
    counts = {}
    for batch in (1, 5):
        with torch.no_grad(), torch.profiler.profile() as profile:
            y = fast(z[:batch], None)
        counts[batch] = sum(e.count for e in profile.key_averages() if e.key == "gdd_fast_C::winograd_conv2d")
        with torch.no_grad():
            want = slow(z[:batch], None)
        assert ((y - want).abs().max() / want.abs().max()).item() < 1e-5
    assert 0 < counts[1] < counts[5]


@NEEDS_WINOGRAD
def test_weights_of_winograds_method_are_made_once_and_do_not_travel() -> None:
    unet = fold(wide_network(), make_target(CPU, torch.float32))[0]
    layer = next(m for m in unet.modules() if isinstance(m, Convolution) and m.winograd is not None)
    before = len(pickle.dumps(layer))
    made = layer.winograd(layer.weight, layer.bias)
    assert layer.winograd(layer.weight, layer.bias) is made
    assert len(pickle.dumps(layer)) == before
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.winograd(twin.weight, twin.bias)[0], made[0])


def transformed(folded) -> int:
    """Bytes of the weights that are made for Winograd's method, once all are."""
    layers = [m for m in folded.modules() if isinstance(m, Convolution) and m.winograd is not None]
    return sum(layer.winograd(layer.weight, layer.bias)[0].numel() * 4 for layer in layers)


@NEEDS_WINOGRAD
@pytest.mark.parametrize("name", ["ncsnpp", "adm"])
def test_transformed_weights_keep_to_their_memory(name: str) -> None:
    """More memory for more layers, those of the largest maps first, and the same images."""
    options = SMALL[name] | {"model_channels": 32}
    net = fill(GDDPrecond(16, 3, **options)).requires_grad_(False)
    weights = 4 * sum(p.numel() for p in net.parameters() if p.ndim == 4)
    z, labels = torch.randn(2, 3, 16, 16), None if not net.label_dim else torch.tensor([0, 1])
    images, taken = [], []
    for times in (0.0, 0.5, 1.0, 4.0):
        generator = OneStepGenerator(net, winograd_memory=times)
        images.append(generator(2, labels, latents=z, output="float"))
        taken.append(transformed(generator.folded))
        assert taken[-1] <= times * weights
        layers = [m for m in generator.folded.modules() if isinstance(m, Convolution) and takes(m.weight)]
        sizes = {}
        for layer in layers:
            layer.register_forward_pre_hook(lambda m, x, sizes=sizes: sizes.__setitem__(m, x[0].shape[-1]))
        generator(2, labels, latents=z)
        used = [sizes[m] for m in layers if m.winograd is not None]
        unused = [
            sizes[m] for m in layers if m.winograd is None and 16 * m.weight.numel() <= times * weights - taken[-1]
        ]
        assert not (used and unused) or min(used) >= max(unused)
    assert taken[0] == 0 and taken == sorted(set(taken))
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="winograd_memory"):
        OneStepGenerator(net, winograd_memory=-1.0)


def test_a_backend_asked_for_by_name_runs_no_kernel_of_ours() -> None:
    target = make_target(CPU, torch.float32, "torch")
    assert not target.winograd
    unet = fold(wide_network(), target)[0]
    assert all(m.winograd is None for m in unet.modules() if isinstance(m, Convolution))


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_on_a_processor_with_amx_is_left_to_the_library(amx: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    full = make_target(CPU, torch.float32).winograd
    assert make_target(CPU, torch.bfloat16).winograd == (full and not amx)
