"""The predictions are arithmetic on counts that are exact: FLOP, bytes and launches of what runs."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.counts.step_kernels import IMAGES, Count, Kernel, count_kernels, fused, on_a_gpu
from benchmarks.peers.training import OUR_SETTINGS
from benchmarks.reports import predictions
from benchmarks.reports.predictions import ATTAINED, BEGIN, END, GPUS, HOST, LAUNCH, TILE, Steps, device_seconds, insert
from gdd_fast.layers.frozen_conv import FrozenConv2d
from gdd_fast.layers.group_norm import GroupNorm
from gdd_fast.layers.linear import Init
from gdd_fast.models.unet_block import UNetBlock

IN, OUT, SIDE = 3, 8, 16
MAP = IMAGES * SIDE**2 * 4
"""Bytes of a channel of a map."""
WEIGHT = OUT * IN * 9


@pytest.fixture(scope="module")
def convolution():
    with FakeTensorMode():
        layer, x = nn.Conv2d(IN, OUT, 3, padding=1), torch.empty(IMAGES, IN, SIDE, SIDE, requires_grad=True)

        def step():
            (layer(x).relu() + 1).sum().backward()

        return count_kernels(step)


def named(count):
    return {kernel.operator: kernel for kernel in count.kernels}


def test_a_convolution_and_its_gradients(convolution):
    found = named(convolution)
    flop = 2.0 * IMAGES * SIDE**2 * WEIGHT
    products = [found[name] for name in ("convolution", "input gradient", "weight gradient")]
    assert [kernel.flop for kernel in products] == [flop] * 3 and convolution.flop == 3 * flop
    assert [kernel.bytes for kernel in products] == [(IN + OUT) * MAP + 4 * WEIGHT] * 3
    assert (products[0].rows, products[0].columns) == (IMAGES * SIDE**2, OUT)
    assert (products[1].rows, products[1].columns) == (IMAGES * SIDE**2, IN)
    assert found["bias"].bytes == 2 * OUT * MAP and found["bias gradient"].bytes == OUT * MAP + 4 * OUT
    assert found["relu"].bytes == 2 * OUT * MAP


def test_another_batch_moves_the_weights_as_often(convolution):
    twice = named(convolution.at(2 * IMAGES))
    assert twice["convolution"].bytes == 2 * (IN + OUT) * MAP + 4 * WEIGHT
    assert twice["convolution"].flop == 2 * named(convolution)["convolution"].flop
    assert twice["bias gradient"].bytes == 2 * OUT * MAP + 4 * OUT
    assert convolution.at(2 * IMAGES).dispatched == convolution.dispatched


def test_a_compiler_makes_one_kernel_of_what_is_between_products():
    with FakeTensorMode(), torch.no_grad():
        first, second = (nn.Conv2d(IN, IN, 1, bias=False) for _ in range(2))
        x = torch.empty(IMAGES, IN, SIDE, SIDE)
        count = count_kernels(lambda: second((first(x).relu() + 1).sigmoid() * x))
    assert [kernel.operator for kernel in count.kernels] == [
        "convolution",
        "relu",
        "add",
        "sigmoid",
        "mul",
        "convolution",
    ]
    kernels = fused(count.kernels)
    assert [kernel.operator for kernel in kernels] == ["convolution", "fused", "convolution"]
    assert kernels[1].bytes == 3 * IN * MAP  # the product and x in, what the next product reads out
    assert kernels[1].at(2 * IMAGES).bytes == 6 * IN * MAP


def test_fused_operators_are_one_operator_each_as_on_a_gpu():
    with FakeTensorMode(), torch.no_grad():
        norm, x = GroupNorm(64), torch.empty(IMAGES, 64, 8, 8)
        with on_a_gpu():
            ours = count_kernels(lambda: norm(x))
        plain = count_kernels(lambda: F.group_norm(x, 16, norm.weight, norm.bias))
    assert [k.operator for k in ours.kernels][-1] == "group_norm_silu"
    assert (
        ours.kernels[-1].reads[0] == ours.kernels[-1].writes[max(ours.kernels[-1].writes) - 2] == 64 * 64 * IMAGES * 4
    )
    assert plain.kernels[0].operator == "native_group_norm statistics"  # its input is read twice


def test_a_gpus_biases_are_added_on_the_way():
    """By the kernel that clamps, which reads and writes the map, and by a block's norms and residual."""
    with FakeTensorMode(), torch.no_grad(), on_a_gpu():
        conv, x = FrozenConv2d(IN, OUT, 3, padding=1), torch.empty(IMAGES, IN, SIDE, SIDE)
        clamped = count_kernels(lambda: conv(x, "relu"))
        block = UNetBlock(32, 32, 8, init=Init(), init_zero=Init())
        whole = count_kernels(lambda: block(torch.empty(IMAGES, 32, 8, 8), torch.empty(IMAGES, 8)))
    assert [k.operator for k in clamped.kernels] == ["convolution", "clamp_"]
    assert clamped.kernels[1].bytes == 2 * OUT * MAP + 4 * OUT
    assert "residual" in named(whole) and "bias" not in named(whole)


def test_the_time_of_a_kernel_is_the_longest_of_three():
    gpu, none = GPUS["H100"], frozenset()
    product = Kernel("convolution", {0: 1}, {}, torch.bfloat16, none, flop=1e12, rows=1 << 20, columns=1 << 10)
    assert device_seconds([product], gpu, tf32=False) == pytest.approx(1e12 / (gpu.bf16 * ATTAINED["bf16"]))
    few = replace(product, rows=TILE, columns=TILE)  # one multiprocessor has it to itself
    assert device_seconds([few], gpu, tf32=False) == pytest.approx(
        1e12 / (gpu.bf16 * ATTAINED["bf16"]) * gpu.multiprocessors
    )
    wide = replace(product, dtype=torch.float32)
    times = [device_seconds([wide], gpu, tf32=tf32) for tf32 in (True, False)]
    assert times == [
        pytest.approx(1e12 / (rate * ATTAINED[kind])) for rate, kind in ((gpu.tf32, "tf32"), (gpu.fp32, "fp32"))
    ]
    copy = Kernel("add", {0: 10**9}, {1: 10**9}, torch.float32, none)
    assert device_seconds([copy], gpu, tf32=False) == pytest.approx(2e9 / (gpu.memory * ATTAINED["memory"]))
    assert device_seconds([Kernel("add", {0: 4}, {1: 4}, torch.float32, none)] * 3, gpu, tf32=False) == 3 * LAUNCH


def test_an_eager_iteration_waits_for_the_host_and_a_captured_one_does_not():
    small = Kernel("add", {0: 4}, {1: 4}, torch.float32, frozenset())
    count, nothing = Count([small] * 100, 100), Count()
    steps = Steps(
        OUR_SETTINGS,
        "fast",
        {"G": count, "D": count, "R1": nothing},
        dict.fromkeys("GD", 0) | {"R1": 0},
        {"G": 0, "D": 0, "R1": 0},
    )
    rate = {row: steps.images_per_second(GPUS["H100"], 32, row) for row in ("fast, eager", "fast, graph")}
    assert rate["fast, eager"] == pytest.approx(32 / (200 * HOST))
    assert rate["fast, graph"] == pytest.approx(32 / (200 * LAUNCH))


def test_the_page_keeps_what_stands_around_the_predictions():
    new = f"{BEGIN}new{END}"
    assert insert(f"above\n{BEGIN}old{END}\nbelow\n", new) == f"above\n{new}\nbelow\n"
    assert insert("above\n", new) == f"above\n\n{new}\n"
    page = predictions.PAGE.read_text(encoding="utf-8")
    marked = page[page.index(BEGIN) : page.index(END)]
    assert "**Arithmetic, not measured**" in marked and all(name in marked for name in GPUS)


@pytest.mark.slow
def test_the_page_is_what_the_command_writes():
    page = predictions.PAGE.read_text(encoding="utf-8")
    assert predictions.section() == page[page.index(BEGIN) : page.index(END) + len(END)]
