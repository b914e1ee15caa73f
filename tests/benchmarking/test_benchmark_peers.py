"""What the benchmarks compare with is the same function, measured in the same way."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import network_cases, pipeline_cases
from benchmarks.cases.layer_calls import ConvCall, MapCall, layers
from benchmarks.cases.operator_cases import operator_cases
from benchmarks.cases.operator_inputs import conv_problem, cudnn_convolution_relu, cudnn_group_norm, pool_problem
from benchmarks.cases.pipeline_cases import read_images
from benchmarks.cases.waterfall_cases import sampling_case
from benchmarks.counts.step_kernels import Count, count_kernels
from benchmarks.harness.case import UnavailableError
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.operator_case import operator_case
from benchmarks.peers import networks as peers
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.models.edm import adm, ncsnpp
from gdd_fast.models.precond import GDDPrecond

CPU = torch.device("cpu")
TINY = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}


@pytest.mark.parametrize("style", [OFFICIAL, BEST])
@pytest.mark.parametrize(
    "arguments",
    [ncsnpp(**TINY), {**ncsnpp(**TINY), "label_dim": 10}, {**adm(**TINY), "model_channels": 64, "label_dim": 10}],
)
def test_stock_generators_are_the_same_function(arguments, style):
    net = peers.randomized(lambda: GDDPrecond(16, 3, **arguments), CPU)
    x, sigma = torch.randn(2, 3, 16, 16) * 80, torch.full((2,), 80.0)
    labels = torch.eye(10)[:2] if "label_dim" in arguments else None
    expected = net(x, sigma, labels)
    assert expected.std() > 0.05  # blocks that do nothing would hide errors
    stock = StockGenerator(net, style, torch.float32)
    assert_close(stock(x, sigma, labels), expected, rtol=1e-4, atol=1e-4)
    assert {id(p) for p in stock.parameters()} == {id(p) for p in net.parameters()}  # shared, none left out


@pytest.mark.parametrize("folded", [False, True])
def test_plain_backbones_are_the_same_function_and_save_what_pytorch_does(folded):
    x = torch.randn(1, 3, 64, 64)
    ours = peers.make_backbone("tf_efficientnet_lite0", 64, CPU, folded=folded)
    plain = peers.plain(peers.make_backbone("tf_efficientnet_lite0", 64, CPU, folded=folded))
    assert not any("Frozen" in type(m).__name__ or "Same" in type(m).__name__[:4] for m in plain.modules())
    for a, b in zip(plain(x), ours(x), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_flops_are_counted_through_second_derivatives():
    weight = torch.empty(8, 4, 3, 3, device="meta", requires_grad=True)
    x = torch.empty(2, 4, 16, 16, device="meta", requires_grad=True)

    def first():
        return nn.functional.conv2d(x, weight, padding=1)

    def second():
        (gradient,) = torch.autograd.grad(first().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    one = 2 * 2 * 16 * 16 * 8 * 4 * 9
    assert count_kernels(first).flop == one
    # forward, its input gradient, and of that one the two gradients that reach the weight and the constant
    assert 3 * one <= count_kernels(second).flop <= 4 * one


def test_layers_of_the_networks():
    found = layers()
    assert {(c.channels, c.resolution) for c in found.attentions if c.heads == 1} == {(256, 16), (256, 8)}
    assert any(c.up and len(c.taps) == 4 for c in found.resamples)
    assert any(c.groups > 1 for c in found.convolutions) and any(c.activation == "relu" for c in found.convolutions)


def test_operator_cases_take_turns_and_name_each_case_once():
    cases = operator_cases(False)
    names = [(c.group, c.name) for c in cases]
    assert len(set(names)) == len(names)
    assert len({c.group.split()[0] for c in cases[:7]}) == 7


def test_sampling_to_disk_refuses_missing_and_wrong_images(tmp_path):
    case = pipeline_cases.pipeline_cases(False)[0]
    assert case.group == "sampling to disk"
    bench = case.build(CPU)
    path = bench.peers["gdd_fast"]()()
    bench.check(path)
    for name, image in (("few", None), ("wrong", np.zeros_like(read_images(path)[0]))):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(bench.images if image is not None else 1):
            Image.fromarray(read_images(path)[0] if image is None else image).save(folder / f"{index:06d}.png")
        with pytest.raises(MismatchError, match="images" if image is None else "levels"):
            bench.check(folder)


def test_sampling_to_disk_has_the_type_that_the_command_samples_in(monkeypatch):
    """Float32, as trained networks are exported, beside the faster one of a GPU."""
    monkeypatch.setattr(pipeline_cases, "_half", lambda device: torch.bfloat16)
    made, make = [], OneStepGenerator.from_network
    monkeypatch.setattr(OneStepGenerator, "from_network", lambda *a, **k: made.append(k["dtype"]) or make(*a, **k))
    bench = pipeline_cases.pipeline_cases(False)[0].build(CPU)
    for peer in ("gdd_fast", "gdd_fast defaults"):
        bench.check(bench.peers[peer]()())
    assert made == [torch.bfloat16, torch.float32]


def test_bytes_of_backward_are_what_it_reads():
    """A ReLU's convolution needs one bit per output, pooling a byte; neither its input again."""
    conv = ConvCall(4, 8, (8, 4, 3, 3), 1, 1, 1, "relu")
    x, weight, bias, y = 4 * 2 * 4 * 64, 4 * 8 * 4 * 9, 4 * 8, 4 * 2 * 8 * 64
    bench = operator_case("c", "c", partial(conv_problem, conv, 2, torch.float32), backward=True).build(CPU)
    assert bench.bytes == (x + weight + bias + y) + (weight + y + x) + 2 * (y // 4 // 8)
    bench = operator_case("p", "p", partial(pool_problem, MapCall(4, 8), 2, torch.float32), backward=True).build(CPU)
    assert bench.bytes == (x + x // 4) + (x // 4 + x) + 2 * (x // 4 // 4)


def test_a_peer_without_gradient_is_timed_where_none_is_wanted(monkeypatch):
    """cuDNN's fused convolution, by the arguments that PyTorch's declaration names."""
    conv = ConvCall(4, 8, (8, 2, 3, 3), 2, 1, 2, "relu")

    def cudnn(input, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", cudnn)
    problem = conv_problem(conv, 2, torch.float32, CPU)
    problem.undifferentiable["fused"] = partial(cudnn_convolution_relu, conv)
    bench = operator_case("c", "c", lambda _: problem, backward=False).build(CPU)
    bench.check(bench.peers["fused"]()())
    assert "fused" not in operator_case("c", "c", lambda _: problem, backward=True).build(CPU).peers


class Trials(TorchDispatchMode):
    """Notes for every convolution the type, and whether cuDNN would try its algorithms."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "convolution" in function.name():
            self.seen.add((arguments[0].dtype, torch.backends.cudnn.benchmark))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["backbone", "block", "generator", "sampling"])
def test_references_and_peers_of_the_size_that_is_timed_try_algorithms(kind, monkeypatch):
    """PyTorch keeps what the first call of a convolution has chosen, in the process."""
    if kind == "generator":  # a small one
        make = peers.make_generator
        monkeypatch.setattr(peers, "make_generator", lambda name, device: make("demo", device))
        monkeypatch.setattr(network_cases, "count_kernels", lambda call: Count())
    case = {
        "backbone": network_cases.backbone_case("tf_efficientnet_lite0", 1, torch.bfloat16, resolution=32),
        "block": network_cases.block_case("ncsnpp-32", "enc.16x16_block1", 1, torch.bfloat16),
        "generator": network_cases.generator_case("ncsnpp-32", 1, torch.bfloat16),
        "sampling": sampling_case("demo", 1),
    }[kind]
    trials = Trials()
    with trials:
        bench = case.build(CPU)
    for name in bench.peers:
        call = bench.peers[name]()
        with trials:
            call()
    timed = torch.float32 if kind == "sampling" else torch.bfloat16
    assert {tried for dtype, tried in trials.seen if dtype == timed} == {True}
    assert not torch.backends.cudnn.benchmark


def test_switches_of_peers_are_put_back():
    def switches():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark

    before = switches()
    assert peers.under_tf32(switches, True)() == ("high", True, True)
    with peers.tf32(False):
        assert switches() == ("highest", False, before[2])
    assert peers.under_tf32(switches, None)() == (*before[:2], True)
    assert switches() == before


def test_the_norm_of_cudnn_frontend_is_differentiated_by_its_own_kernels(monkeypatch):
    """Its functions as PyTorch's, in the place of a package that runs on one kind of GPU."""
    shape, groups = (2, 8, 4, 4), 2

    def norm_fprop(variant, x, gamma, beta, *, eps, num_groups):
        assert variant == "group" and gamma.dtype == beta.dtype == x.dtype
        return torch.ops.aten.native_group_norm(x, gamma, beta, *x.shape[:2], 16, num_groups, eps)

    def norm_bprop(variant, dy, x, gamma, mean, rstd, *, num_groups):
        sizes = (*x.shape[:2], 16, num_groups, [True] * 3)
        found = torch.ops.aten.native_group_norm_backward(dy.contiguous(), x, mean, rstd, gamma, *sizes)
        return tuple(t.float() for t in found)

    for name, members in {
        "cudnn.norm": {"NormVariant": SimpleNamespace(GROUP_NORM="group")},
        "cudnn.norm.fprop.api": {"norm_fprop": norm_fprop},
        "cudnn.norm.bprop.api": {"norm_bprop": norm_bprop},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm, dy = cudnn_group_norm(groups, 1e-6, CPU), torch.randn(shape, dtype=torch.float64)
    y, want = norm(x, weight, bias), F.group_norm(x, groups, weight, bias, 1e-6)
    assert_close(y, want)
    for a, b in zip(*(torch.autograd.grad(t, (x, weight, bias), dy) for t in (y, want)), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UnavailableError, match="sm_100"):
        cudnn_group_norm(groups, 1e-6, CPU)
