"""What the benchmarks compare with is the same function, and the battery survives what it measures."""

import itertools
import sys
from dataclasses import asdict, replace
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

from benchmarks.cases import network_cases
from benchmarks.cases.layer_calls import NETWORKS, ConvCall, MapCall, layers
from benchmarks.cases.operator_cases import operator_cases
from benchmarks.cases.operator_inputs import conv_problem, pool_problem
from benchmarks.cases.pipeline_cases import pipeline_cases, read_images
from benchmarks.cases.training_cases import compiled_cases as compiled_training
from benchmarks.cases.training_cases import settings_bench, settings_for, training_case, training_cases
from benchmarks.counts.flops import count_flops
from benchmarks.harness.case import Effort, UnavailableError, measure_case
from benchmarks.harness.checks import MismatchError
from benchmarks.harness.operator_case import operator_case
from benchmarks.harness.results import Results, Row
from benchmarks.harness.training_checks import FLOAT32, Reference, Types, in_types, step_parts
from benchmarks.peers import networks as peers
from benchmarks.peers.cudnn_norm import cudnn_group_norm
from benchmarks.peers.stock_unet import BEST, OFFICIAL, StockGenerator
from benchmarks.peers.training import OUR_SETTINGS, STOCK_SETTINGS, Batch, Settings, Setup, Training
from benchmarks.reports import roofline, waterfall
from gdd_fast.config import PRESETS, override
from gdd_fast.layers import convolution, frozen_conv, self_attention
from gdd_fast.models import discriminator
from gdd_fast.models.backbones import deit
from gdd_fast.models.edm import adm, ncsnpp
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ops import group_norm_silu, residual

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
    assert count_flops(first) == one
    # forward, its input gradient, and of that one the two gradients that reach the weight and the constant
    assert 3 * one <= count_flops(second) <= 4 * one


def test_layers_of_the_networks():
    found = layers()
    assert {(c.channels, c.resolution) for c in found.attentions if c.heads == 1} == {(256, 16), (256, 8)}
    assert any(c.up and len(c.taps) == 4 for c in found.resamples)
    assert any(c.groups > 1 for c in found.convolutions) and any(c.activation == "relu" for c in found.convolutions)


def test_operator_cases_take_turns_and_name_each_case_once():
    cases = operator_cases(False)
    names = [(c.group, c.name) for c in cases]
    assert len(set(names)) == len(names)
    assert len({c.group.split()[0] for c in cases[:8]}) == 8


def test_settings_of_the_waterfall_add_one_technique_each():
    steps = list(waterfall.training_steps(CPU).values())
    changed = [[k for k in asdict(a) if asdict(a)[k] != asdict(b)[k]] for a, b in itertools.pairwise(steps)]
    assert all(changed) and steps[0].optimizer == "loop" and not steps[0].channels_last
    ours = next(s for s in steps if s.optimizer == "adam_ema")
    assert (ours.unet, ours.features) == (OUR_SETTINGS.unet, OUR_SETTINGS.features)


def test_parts_of_the_roofline_have_flops_and_bytes():
    setup = Setup("demo", 2)
    training, batch = roofline.on_meta(setup, Settings(generator_dtype=torch.float32))
    counted = {name: count_flops(call) for name, call in roofline.parts(training, batch).items()}
    assert all(counted.values())
    assert 1.5 < counted["generator forward+backward"] / counted["generator forward"] < 3.1
    assert 1.9 < counted["backbones forward+input gradient"] / counted["backbones forward"] < 2.1
    assert counted["R1"] > counted["backbones forward+input gradient"]
    moved = roofline.least_bytes(training, batch)
    assert moved.keys() == counted.keys() and all(size > 0 for size in moved.values())


def test_a_training_step_applies_its_gradients_once():
    training = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU)
    batch = Batch.draw(training)
    weights = [p for p in training.generator.parameters() if p.requires_grad]
    before = [w.detach().clone() for w in weights]
    gradients = training.step("G", batch)
    assert any(g.abs().max() > 0 for g in gradients)
    moved = max(float((w.detach() - b).abs().max()) for w, b in zip(weights, before, strict=True))
    assert 0 < moved <= 1.01 * training.setup.config.generator.g_lr


@pytest.fixture(scope="module")
def generator_step():
    return Reference("G step", Setup("demo", 4), CPU)


BF16 = Types(torch.bfloat16, torch.bfloat16)


def test_the_halves_of_a_generator_step_make_the_whole():
    training = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU)
    batch = Batch.draw(training)
    put_back = training.undo()
    upstream = training.image_gradient(training.images(batch), None)
    halves = training.weight_gradients(batch, upstream)
    put_back()
    for half, whole in zip(halves, training.gradients("G", batch), strict=True):
        assert_close(half, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()) + 1e-9)


@pytest.mark.parametrize("types", [BF16, FLOAT32], ids=str)
def test_our_step_is_right(generator_step, types):
    generator_step.check_in(types, OUR_SETTINGS)


def multiplied(monkeypatch, place, operator, factor):
    """`operator` of the module `place` returns `factor` times what it should."""
    right = getattr(place, operator)

    def wrong(*args, **options):
        found = right(*args, **options)
        return [t * factor for t in found] if isinstance(found, list) else found * factor

    monkeypatch.setattr(place, operator, wrong)


OPERATORS = [
    (convolution, "resample2d"),
    (self_attention, "attention"),
    (convolution, "frozen_conv2d"),
    (group_norm_silu, "group_norm_silu"),
    (residual, "residual"),
    (frozen_conv, "frozen_conv2d_relu"),
    (discriminator, "discriminator_input"),
]


@pytest.mark.parametrize(("place", "operator"), OPERATORS, ids=lambda p: p if isinstance(p, str) else "")
def test_an_operator_wrong_by_a_percent_gives_a_training_step_no_time(generator_step, place, operator, monkeypatch):
    multiplied(monkeypatch, place, operator, 1.01)
    with pytest.raises(MismatchError, match="differs by"):
        generator_step.check_in(FLOAT32, OUR_SETTINGS)


def test_in_bf16_an_operator_has_to_be_more_wrong_than_its_rounding(generator_step, monkeypatch):
    multiplied(monkeypatch, convolution, "resample2d", 1.2)
    with pytest.raises(MismatchError, match="differs by"):
        generator_step.check_in(BF16, OUR_SETTINGS)


def test_the_first_gradients_of_a_timed_step_are_compared():
    reference = Reference("iteration", Setup("demo", 4), CPU)
    found = {"G": Training(Setup("demo", 4), in_types(OUR_SETTINGS), CPU).step("G", reference.batch)}
    reference.check_step(FLOAT32, found)
    with pytest.raises(MismatchError):
        reference.check_step(FLOAT32, {**found, "G": [g * 1.4 for g in found["G"]]})


def test_an_iteration_is_both_steps_and_a_sixteenth_of_r1(monkeypatch):
    """All of it compared, and timed by its shares; R1, which only some iterations have, stays out of a peer's graph."""
    graphs = []
    monkeypatch.setattr(Training, "captured", lambda training, call: graphs.append(call) or call)
    settings = replace(in_types(OUR_SETTINGS), engine="graph")
    bench = settings_bench("iteration", Setup("demo", 2), {"graph": settings}, CPU)
    call = bench.peers["graph"]()
    assert [share for _, share in call.parts] == [1, 1 / 16]
    first = call()
    assert list(first) == ["G", "D", "R1"] and call() is None
    bench.checks["graph"](first)
    assert len(graphs) == 2 and all(list(graph()) == ["G", "D"] for graph in graphs)


class FakeCuda:
    """What capturing asks of torch.cuda, noted in order; a capture computes at once, and a replay does nothing."""

    def __init__(self, monkeypatch):
        self.noted = []
        for name in ("current_stream", "Stream", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, self._noting(name))

    def _noting(self, name):
        def call(*arguments):
            self.noted.append(name)
            return self

        return call

    def wait_stream(self, other):
        self.noted.append("wait")

    def replay(self):
        self.noted.append("replay")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.noted.append("end")


@pytest.mark.parametrize("step", ["G step", "D step", "iteration"])
def test_a_captured_step_begins_where_its_warm_up_did(monkeypatch, step):
    settings = in_types(STOCK_SETTINGS)
    expected = Training(Setup("demo", 2), settings, CPU)
    want = step_parts(step, expected, Batch.draw(expected))[0][0]()
    training = Training(Setup("demo", 2), replace(settings, engine="graph"), CPU)
    fake, gradients_before = FakeCuda(monkeypatch), []
    work, _ = step_parts(step, training, Batch.draw(training))[0]
    replayed = training.captured(lambda: (gradients_before.append(fake.noted[-1]), work())[1])
    assert gradients_before == ["stream"] * 3 + ["graph"]
    assert fake.noted.count("wait") == 2 and "replay" not in fake.noted
    found = replayed()
    assert fake.noted[-1] == "replay" and training.optimizers[0].param_groups[0]["capturable"]
    for name in want:
        for a, b in zip(found[name], want[name], strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_peers_of_training_on_a_gpu(monkeypatch):
    """Stock eager, as a graph, and compiled in a case of its own; R1 differentiates twice and stays eager."""
    built = {}

    def bench(step, setup, peers, device, compared=None):
        return built.setdefault((step, compared), {name: s.engine for name, s in peers.items()})

    monkeypatch.setattr("benchmarks.cases.training_cases.settings_bench", bench)
    gpu, setup = torch.device("cuda"), Setup("cifar10-uncond-gdd-i", 128)
    for case in [*training_cases(True), *compiled_training()]:
        if setup.preset in case.name and "batch 128" in case.name:
            case.build(gpu)
    eager = {"official": "eager", "stock": "eager", "gdd_fast": "eager"}
    both = {"compile": "compile", "max-autotune": "max-autotune"}
    assert built == {
        ("R1 step", None): eager,
        **{(step, None): {**eager, "graph": "graph"} for step in ("iteration", "G step", "D step")},
        **{(step, 128): both for step in ("iteration", "G step", "D step")},
    }
    assert {s.engine for s in settings_for(CPU).values()} == {"eager"}


def test_compiled_losses_are_the_losses(monkeypatch):
    """The calls around the compiler: its modes, and that a new step is announced before each."""
    asked, steps = [], []

    def compile(function, *, dynamic, mode):
        asked.append((function.__name__, dynamic, mode))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(len(asked)))
    settings = in_types(STOCK_SETTINGS)
    eager = Training(Setup("demo", 2), settings, CPU)
    training = Training(Setup("demo", 2), replace(settings, engine="max-autotune"), CPU)
    assert asked == [("_generator_loss", False, "max-autotune"), ("_discriminator_loss", False, "max-autotune")]
    batch = Batch.draw(eager)
    for step in ("G", "D"):
        for a, b in zip(training.step(step, batch), eager.step(step, batch), strict=True):
            assert torch.equal(a, b)
    assert len(steps) == 2


def test_roofline_page_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    record = Results({"device": "d", "type": "cpu", "cores": 2}, {"copy": 1e9, "fp32": 1e12})
    record.add([Row(roofline.GROUP, "R1", "gdd_fast", wall=[2, 2, 2], flops=10**12, bytes=10**8)])
    record.add(
        [Row(waterfall.TRAINING, "demo", peer, wall=[t, t, t]) for peer, t in (("a", 2.0), ("gdd_fast: b", 1.0))]
    )
    page = roofline.page([record])
    assert "| R1 | 1000 | 100 | 1 s | 2 s | 2.00 |" in page and "| gdd_fast: b | 1 s | 2.00 x |" in page
    roofline.draw(record, tmp_path / "w.png")
    assert (tmp_path / "w.png").stat().st_size > 5000


def test_stock_adam_leaves_everything_as_it_was_for_a_gradient_that_is_not_finite():
    weight = torch.ones(3, requires_grad=True)
    adam = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.tensor([1.0, float("inf"), 1.0])
    peers.step_if_finite(adam, [weight.grad])
    assert weight.tolist() == [1, 1, 1] and not float(adam.state[weight]["step"])
    weight.grad = torch.ones(3)
    peers.step_if_finite(adam, [weight.grad])
    assert (weight < 1).all() and float(adam.state[weight]["step"]) == 1


def test_sampling_to_disk_refuses_missing_and_wrong_images(tmp_path):
    case = pipeline_cases(False)[0]
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


def test_bytes_of_backward_are_what_it_reads():
    """A ReLU's convolution needs one bit per output, pooling a byte; neither its input again."""
    conv = ConvCall(4, 8, (8, 4, 3, 3), 1, 1, 1, "relu")
    x, weight, bias, y = 4 * 2 * 4 * 64, 4 * 8 * 4 * 9, 4 * 8, 4 * 2 * 8 * 64
    bench = operator_case("c", "c", partial(conv_problem, conv, 2, torch.float32), backward=True).build(CPU)
    assert bench.bytes == (x + weight + bias + y) + (weight + y + x) + 2 * (y // 4 // 8)
    bench = operator_case("p", "p", partial(pool_problem, MapCall(4, 8), 2, torch.float32), backward=True).build(CPU)
    assert bench.bytes == (x + x // 4) + (x // 4 + x) + 2 * (x // 4 // 4)


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
        monkeypatch.setattr(network_cases, "count_flops", lambda call: 0)
    case = {
        "backbone": network_cases.backbone_case("tf_efficientnet_lite0", 1, torch.bfloat16, resolution=32),
        "block": network_cases.block_case("ncsnpp-32", "enc.16x16_block1", 1, torch.bfloat16),
        "generator": network_cases.generator_case("ncsnpp-32", 1, torch.bfloat16),
        "sampling": waterfall.waterfall_cases(CPU, smoke=True)[1],
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


def test_a_training_that_is_not_timed_tries_no_algorithms():
    for trials in (False, True):
        training, seen = Training(Setup("demo", 2), Settings(generator_dtype=torch.float32), CPU, trials=trials), []
        training._losses["G"] = lambda *_, seen=seen: seen.append(torch.backends.cudnn.benchmark)
        with pytest.raises(AttributeError):
            training.step("G", Batch(None, None, None))
        assert seen == [trials]


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


_KINDS = dict.fromkeys((case.build.args[0], case.build.args[1].preset) for case in training_cases(True))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "preset"), _KINDS)
def test_every_kind_of_training_case_is_right_at_batch_2(step, preset, monkeypatch):
    """Every layer of the networks and the backbones; fewer channels in generator, DeiT and heads, smaller images."""
    small = {name: (side, {**given, "model_channels": 64}) for name, (side, given) in NETWORKS.items()}
    monkeypatch.setattr(peers, "NETWORKS", small)
    monkeypatch.setattr(deit, "_WIDTH", 96)
    monkeypatch.setattr(deit.DeitBase, "tap_channels", (96,) * 4)
    config, judges = PRESETS[preset], PRESETS[preset].discriminator.backbones
    resolution = 64 if "vgg16_bn" in judges else 224  # DeiT takes no other
    config = override(config, disc_resolution=resolution, head_width=0.125)
    monkeypatch.setattr(Setup, "config", config)
    rows = list(measure_case(training_case(step, Setup(preset, 2)), CPU, Effort(0.0)))
    assert [(row.peer, row.failure) for row in rows] == [(peer, None) for peer in ("official", "stock", "gdd_fast")]
