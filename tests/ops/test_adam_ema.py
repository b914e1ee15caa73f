"""adam_ema_ and its optimizer: torch.optim.Adam followed by lerp, except for steps that are not finite."""

import copy

import pytest
import torch
from adam_steps import (
    BACKENDS,
    SHAPES,
    assert_close,
    averages_of,
    fused_steps,
    in_groups,
    parameters,
    set_gradients,
    torch_steps,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdd_fast.errors import BackendError, InputError
from gdd_fast.ops import adam_ema as operator_module
from gdd_fast.ops.adam_ema import Group, adam_ema_, adam_ema_ref_, adam_ema_waitless_
from gdd_fast.training.optimizer import AdamEma
from parity import device_for


@BACKENDS
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999), (0.4, 0.9)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_hundred_steps_equal_adam_then_lerp(weight_decay, betas, backend):
    """No further from float64 than twice torch's own float32 steps, apart from the last bit."""
    options = {"lr": 1e-2, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    exact, eager, fused = parameters(backend, torch.float64), parameters(backend), parameters(backend)
    exact_averages, eager_averages, fused_averages = (averages_of(p) for p in (exact, eager, fused))
    torch_steps(exact, exact_averages, 100, 0.9, **options)
    torch_steps(eager, eager_averages, 100, 0.9, **options)
    fused_steps(AdamEma(fused, averages=fused_averages, backend=backend, **options), fused, 100, 0.9)
    for want, reference, got in (
        (exact, eager, fused),
        (exact_averages.values(), eager_averages.values(), fused_averages.values()),
    ):
        for w, r, g in zip(want, reference, got, strict=True):
            if w.numel():
                eager_error, error = ((t.double() - w).abs().max().item() for t in (r, g))
                assert error <= 2 * eager_error + torch.finfo(g.dtype).eps * w.abs().max().item()


@pytest.fixture
def waitless(monkeypatch):
    """On a CPU, what "torch" runs on a GPU."""
    calls = []

    def run(*arguments):
        calls.append(arguments)
        adam_ema_waitless_(*arguments)

    monkeypatch.setattr(operator_module, "adam_ema_ref_", run)
    yield
    assert calls


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_without_nvcc_a_gpu_takes_the_same_steps(weight_decay, betas, waitless):
    test_hundred_steps_equal_adam_then_lerp(weight_decay, betas, "torch")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_without_nvcc_a_gpu_leaves_out_the_same_steps(bad, waitless):
    test_step_that_is_not_finite_changes_nothing_and_is_counted(bad, "torch")
    test_huge_gradients_are_finite("torch")
    test_a_group_that_is_not_finite_stops_all("torch")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_nvcc_averages_move_not_at_all_or_all_the_way(weight, waitless):
    params = parameters("torch")
    averages = averages_of(params)
    fused_steps(AdamEma(params, averages=averages, backend="torch"), params, 2, 1 - weight, bad_steps=(1,))
    assert_close(averages.values(), params if weight else parameters("torch"), rtol=0, atol=0)


def test_without_nvcc_no_step_waits_for_the_gpu(monkeypatch):
    """A tensor of the meta device has no value: whoever asks for one, as the definition does, gets an error."""
    fused = []
    monkeypatch.setattr(torch, "_fused_adam_", lambda *lists, **options: fused.append(options))  # not made for meta
    lists = [[torch.empty(shape, device="meta") for shape in SHAPES] for _ in range(5)]
    kinds = (torch.float32, torch.int64, torch.float64, torch.float64)
    step, skipped, lr, weight = (torch.empty((), dtype=dtype, device="meta") for dtype in kinds)
    adam_ema_waitless_(*lists, step, skipped, lr, weight, [Group(len(SHAPES))])
    assert [options["lr"].device.type for options in fused] == ["meta"]
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        adam_ema_ref_(*lists, step, skipped, lr, weight, [Group(len(SHAPES))])


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_step_that_is_not_finite_changes_nothing_and_is_counted(bad, backend):
    params, twin = parameters(backend), parameters(backend)
    averages, twin_averages = averages_of(params), averages_of(twin)
    optimizer = AdamEma(params, lr=1e-2, averages=averages, backend=backend)
    fused_steps(optimizer, params, 2, 0.5)
    before = copy.deepcopy([*params, *averages.values(), optimizer.state_dict()["state"]])
    set_gradients(params, 2, bad)
    optimizer.step()
    after = [*params, *averages.values(), optimizer.state_dict()["state"]]
    assert_close(after[:-1], before[:-1], rtol=0, atol=0)
    for old, new in zip(before[-1].values(), after[-1].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert int(optimizer.skipped) == 1
    fused_steps(optimizer, params, 2, 0.5, first=3)
    torch_steps(twin, twin_averages, 5, 0.5, bad_steps=(2,), lr=1e-2)
    assert_close(params, twin)
    assert_close(averages.values(), twin_averages.values())


@BACKENDS
def test_huge_gradients_are_finite(backend):
    params = parameters(backend)
    optimizer = AdamEma(params, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    assert int(optimizer.skipped) == 0


@BACKENDS
def test_written_tensors_show_it(backend):
    """Casts of weights are kept by the weights' version: of averages too, or sample grids would be of old weights."""
    params = parameters(backend)
    averages = {p: p.detach().clone() for p in params}
    optimizer = AdamEma(params, lr=1e-2, averages=averages, backend=backend)
    optimizer.average_weight.fill_(0.5)
    before = [t._version for t in (*params, *averages.values())]
    fused_steps(optimizer, params, 1, 0)
    assert all(t._version > b for t, b in zip((*params, *averages.values()), before, strict=True))


@BACKENDS
def test_a_group_that_is_not_finite_stops_all(backend):
    params = parameters(backend)
    before = copy.deepcopy(params)
    optimizer = AdamEma(in_groups(params), backend=backend)
    set_gradients(params, 0, bad=float("nan"))  # in the last group
    optimizer.step()
    assert int(optimizer.skipped) == 1
    assert_close(params, before, rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """Counts the copies that PyTorch is asked for, but those of single numbers."""

    made = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.made += function is torch.ops.aten.copy_.default and arguments[0].dim() > 0
        return function(*arguments, **(options or {}))


@BACKENDS
@pytest.mark.parametrize(
    ("shape", "strides", "copies"),
    [
        ((6, 5, 1, 1), (5, 1, 1, 1), 0),  # of a 1x1 convolution in channels_last: the same memory
        ((1, 5, 3, 3), (7, 1, 15, 5), 0),
        ((6, 5, 3, 3), (45, 9, 3, 1), 1),  # contiguous
        ((6, 5, 1, 1), (1, 6, 1, 1), 1),  # transposed
    ],
)
def test_a_gradient_is_copied_only_if_its_memory_differs(shape, strides, copies, backend):
    """Strides of sizes of 1 say nothing of it."""
    device = device_for(backend)
    weight = torch.empty(shape, device=device, memory_format=torch.channels_last).normal_()
    one, other = (nn.Parameter(weight.clone()) for _ in range(2))
    one.grad = torch.empty_strided(shape, strides, device=device).normal_()
    other.grad = torch.empty_like(other).copy_(one.grad)
    assert one.grad.stride() == strides != one.stride() == other.grad.stride()
    with Copies() as seen:
        AdamEma([one], backend=backend).step()
    assert seen.made == copies
    torch.optim.Adam([other]).step()
    assert_close(one, other)


@BACKENDS
def test_state_may_differ_in_strides_that_say_nothing(backend):
    (params, *lists), state = arguments(backend, [(6, 5, 1, 1), (3,)])[:5], arguments(backend)[5:]
    params[0] = torch.as_strided(params[0], (6, 5, 1, 1), (5, 1, 5, 5))
    others = [[torch.as_strided(t[0], (6, 5, 1, 1), (5, 1, 1, 1)), t[1]] for t in lists]
    before = params[0].clone()
    torch.ops.gdd_fast.adam_ema_(params, *others, *state[:-6], [1, 1], *state[-5:])
    assert (params[0] != before).all()
    wrong = [torch.empty(5, 6, 1, 1, device=before.device).transpose(0, 1), lists[1][1]]
    if backend != "torch":
        with pytest.raises(ValueError, match="in memory like its parameter"):
            torch.ops.gdd_fast.adam_ema_(params, lists[0], wrong, *lists[2:], *state[:-6], [1, 1], *state[-5:])


@BACKENDS
def test_repeats_to_the_bit(backend):
    results = []
    for _ in range(2):
        params = parameters(backend)
        averages = averages_of(params)
        fused_steps(AdamEma(params, averages=averages, backend=backend), params, 3, 0.5)
        results.append([*params, *averages.values()])
    assert_close(*results, rtol=0, atol=0)


def arguments(backend, shapes=SHAPES):
    params = [p.detach() for p in parameters(backend, shapes=shapes)]
    lists = [[torch.rand_like(p) for p in params] for _ in range(4)]
    one = lambda value, dtype: torch.tensor(value, dtype=dtype, device=params[0].device)
    lr = torch.tensor([1e-3, 1e-2], dtype=torch.float64, device=params[0].device)
    state = one(2.0, torch.float32), one(0, torch.int64), lr, one(0.5, torch.float64)
    return (params, *lists, *state, [2, len(params) - 2], [0.9, 0.0], [0.99] * 2, [1e-8] * 2, [0.0, 0.1], backend)


@BACKENDS
def test_registration(backend):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gdd_fast.adam_ema_.default, arguments(backend), test_utils=checks)


@BACKENDS
def test_compiles_in_one_graph(backend):
    lists, options = arguments(backend)[:9], arguments(backend)[9:]
    want, got = copy.deepcopy(lists), copy.deepcopy(lists)

    def function(*lists):
        torch.ops.gdd_fast.adam_ema_(*lists, *options)
        return lists[0][0] * 1

    function(*want)
    torch.compile(function, fullgraph=True, backend="aot_eager")(*got)
    for a, b in zip(got[:5], want[:5], strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert float(got[5]) == 3


def test_bad_input_is_refused():
    params = [torch.zeros(3)]
    one = lambda dtype: torch.zeros((), dtype=dtype)
    state = one(torch.float32), one(torch.int64), one(torch.float64)
    weight = one(torch.float64)
    with pytest.raises(InputError, match="0 grads for 1"):
        adam_ema_(params, [], params, params, *state, average_weight=weight)
    with pytest.raises(InputError, match=r"float32 like their.*float64"):
        adam_ema_(params, [torch.zeros(3, dtype=torch.float64)], params, params, *state, average_weight=weight)
    with pytest.raises(InputError, match="lr must be one"):
        adam_ema_(params, params, params, params, *state[:2], one(torch.float32), average_weight=weight)
    matrix, other = [torch.zeros(2, 3)], [torch.zeros(3, 2).T]
    with pytest.raises(InputError, match="one per group"):
        adam_ema_(params, params, params, params, *state, average_weight=weight, groups=[Group(1), Group(0)])
    with pytest.raises(InputError, match=r"groups of \[2\] tensors for 1"):
        adam_ema_(params, params, params, params, *state, average_weight=weight, groups=[Group(2)])
    with pytest.raises(InputError, match=r"betas must be in \[0, 1\)"):
        adam_ema_(params, params, params, params, *state, average_weight=weight, betas=(0.9, 1.0))
    with pytest.raises(InputError, match="lie in memory"):
        adam_ema_(matrix, matrix, other, matrix, *state, average_weight=weight)
    apart = [torch.zeros(3, 4)[:, :2]]
    with pytest.raises(InputError, match="dense in memory"):
        adam_ema_(apart, apart, apart, apart, *state, average_weight=weight)
    with pytest.raises(BackendError, match="no triton"):
        adam_ema_(params, params, params, params, *state, average_weight=weight, backend="triton")
