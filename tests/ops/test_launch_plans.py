"""Launch plans: kept by the kind of a call and nothing else, and what they launch is what Triton would."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import types
import weakref

import pytest
import torch
from torch import Tensor

from benchmarks.counts.offline import ROOT
from gdd_fast.backend import extension, has_extension, obstacle
from gdd_fast.ops import _planned, max_pool2x2, residual
from gdd_fast.ops import group_norm_silu as norm
from gdd_fast.ops.frozen_conv2d_relu import frozen_conv2d_relu
from gdd_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_ref
from parity import device_for

pytest.importorskip("triton")
DEVICE = device_for("triton")
pytestmark = pytest.mark.skipif(
    not has_extension() or obstacle(norm.OPERATOR, "triton", DEVICE) is not None,
    reason="the extension gdd_fast._C or a GPU is not there",
)


class Spied:
    """The plans of group_norm_silu in a cache of its own, and the calls of its planner."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[str] = []

        def planner(direction, *arguments):
            self.made.append(direction)
            return norm._plan(direction, *arguments)

        self.cache = extension().LaunchPlans(planner)
        monkeypatch.setattr(norm, "plans", lambda _: (extension(), self.cache))

    def new(self, function) -> list[str]:
        """What had to be planned for a call."""
        self.made.clear()
        function()
        return list(self.made)


def maps(*shape: int, dtype=torch.float32, layout=torch.channels_last, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=layout).requires_grad_()


def test_a_plan_is_made_once_for_a_kind_of_call_and_for_no_other(monkeypatch):
    spied = Spied(monkeypatch)
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)

    def call(x, groups=4, eps=1e-5, **options):
        return lambda: group_norm_silu(x, groups, weight, bias, eps, backend="triton", **options)

    assert spied.new(call(maps(2, 16, 4, 4))) == ["forward"]
    assert spied.new(call(maps(2, 16, 4, 4, seed=1))) == []
    # six floats into its memory: of the same shape and strides, aligned otherwise
    shifted = torch.randn(2 * 256 + 6, device=DEVICE)[6:].as_strided((2, 16, 4, 4), (256, 1, 64, 16))
    others = {
        "shape": call(maps(2, 16, 4, 5)),
        "batch": call(maps(1, 16, 4, 4)),
        "strides": call(maps(2, 16, 4, 4, layout=torch.contiguous_format)),
        "type": call(maps(2, 16, 4, 4, dtype=torch.float16)),
        "alignment": call(shifted),
        "groups": call(maps(2, 16, 4, 4), groups=2),
        "eps": call(maps(2, 16, 4, 4), eps=1e-6),
        "presence": call(maps(2, 16, 4, 4), add=torch.zeros(2, 16, device=DEVICE)),
        "activation": call(maps(2, 16, 4, 4), activation=None),
    }
    for name, other in others.items():
        assert spied.new(other) == ["forward"], name
        assert spied.new(other) == [], name
    assert len(spied.cache) == 1 + len(others)

    def both(x):
        return lambda: torch.autograd.grad(call(x)().sum(), x)

    assert spied.new(both(maps(2, 16, 4, 4))) == ["backward"]
    assert spied.new(both(maps(2, 16, 4, 4, seed=2))) == []


def test_no_value_is_remembered(monkeypatch):
    Spied(monkeypatch)
    for seed in range(3):
        x = maps(2, 16, 4, 4, seed=seed)
        weight, bias = (torch.full((16,), float(v), device=DEVICE).requires_grad_() for v in (seed + 1, seed))
        y = group_norm_silu(x, 4, weight, bias, backend="triton")
        want = group_norm_silu_ref(x, 4, weight, bias)
        torch.testing.assert_close(y, want)
        got, wanted = (torch.autograd.grad(t.square().sum(), (x, weight, bias)) for t in (y, want))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_tensor_is_kept_alive(monkeypatch):
    Spied(monkeypatch)
    x = maps(2, 16, 4, 4)
    y = group_norm_silu(x, 4, torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE), backend="triton")
    y.sum().backward()
    memories = [weakref.ref(t.untyped_storage()) for t in (x, y)]
    tensors = [weakref.ref(t) for t in (x, y)]
    del x, y
    gc.collect()
    assert all(reference() is None for reference in [*tensors, *memories])


def test_modes_and_compilers_see_operators_instead(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    spied = Spied(monkeypatch)
    x = maps(1, 8, 2, 2)
    weight = torch.ones(8, device=DEVICE)
    call = lambda x: group_norm_silu(x, 2, weight, weight, backend="triton")

    def counted():
        with FlopCounterMode(display=False):
            call(x)

    assert spied.new(counted) == []
    assert spied.new(lambda: torch.compile(call, backend="aot_eager")(x)) == []
    assert spied.new(lambda: call(x)) == ["forward"]


def test_every_operator_runs_by_plan(monkeypatch):
    """None of torch.library's is called."""
    fail = lambda *arguments, **options: pytest.fail("an operator of torch.library was called")
    for name in ("group_norm_silu", "residual", "max_pool2x2", "relu_bits_"):
        monkeypatch.setattr(getattr(torch.ops.gdd_fast, name), "default", fail, raising=False)
        monkeypatch.setattr(type(torch.ops.gdd_fast.residual), "__call__", fail)
    x, weight = maps(1, 8, 4, 4), torch.ones(8, device=DEVICE)
    y = group_norm_silu(x, 2, weight, weight, backend="triton")
    y, _ = residual.residual(y, x, statistics=True, backend="triton")
    y = max_pool2x2.max_pool2x2(y, backend="triton")
    y = frozen_conv2d_relu(y, torch.randn(4, 8, 1, 1, device=DEVICE), backend="triton")
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


class Stream:
    """Of a GPU that is not there, other than its default one."""

    cuda_stream = 7


@pytest.mark.parametrize(("told", "known"), [(lambda now: now, True), (lambda now: 0, False)], ids=["told", "not"])
def test_streams_are_known_where_another_than_the_default_is_told(told, known, monkeypatch):
    """The default stream's handle is 0, which is also what somebody says who knows of none."""
    current = [types.SimpleNamespace(cuda_stream=0)]

    @contextlib.contextmanager
    def stream(other):
        current.append(other)
        yield
        current.pop()

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device: empty(*shape))
    for name, value in (
        ("is_available", lambda: True), ("Stream", Stream), ("stream", stream), ("current_stream", lambda: current[-1])
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    module = types.SimpleNamespace(current_stream=lambda x: told(current[-1].cuda_stream))
    assert _planned._knows_streams.__wrapped__(module) is known
    assert current[-1].cuda_stream == 0


_LAUNCHED = """
import json, math, os, threading
import torch
from torch.nn import functional as F
from benchmarks.counts.host_cost import Row, rows, without_plans
from benchmarks.counts.host_gpu import stubbed
from gdd_fast.ops.group_norm_silu import group_norm_silu
from gdd_fast.ops.residual import residual
from parity import promised
from watched_launches import watched

def strange():
    # six floats into its memory, and images more than 2^31 elements apart
    shape = (2, 32, 8, 8)
    shifted = torch.zeros(2 * 2048 + 6)[6:].as_strided(shape, (2048, 1, 256, 32))
    far = promised(2**31 + 4096).as_strided(shape, (2**31 + 16, 1, 256, 32))
    weight = torch.ones(32)
    for name, x in (("shifted", shifted), ("far", far)):
        yield Row(name + " norm", lambda x, w: group_norm_silu(x, 8, w, w, backend="triton"),
            lambda x, w: F.group_norm(x, 8, w, w), [x.requires_grad_(), weight.clone().requires_grad_()])
        yield Row(name + " residual", lambda x, skip: residual(x, skip, backend="triton"), torch.add,
            [x.detach().requires_grad_(), torch.ones(shape).requires_grad_()])

def seen(stub, row, shape):
    with watched(stub) as found:
        torch.autograd.grad(row.ours(*row.inputs), row.inputs, shape)
    given = {t.data_ptr(): i for i, t in enumerate(row.inputs)}
    return [
        (s.kernel, s.grid, s.threads, s.shared, s.numbers, {n: given.get(a, "made") for n, a in s.addresses.items()})
        for s in found
    ]

with stubbed() as stub:
    result = {}
    for row in (*rows(size=32, batch=2), *strange()):
        shape = torch.ones_like(row.theirs(*row.inputs))
        ours = [seen(stub, row, shape) for _ in range(2)]
        with without_plans():
            result[row.name] = [*ours, seen(stub, row, shape)]

    def launched():
        with torch.no_grad():
            try:
                group_norm_silu(torch.zeros(2, 32, 8, 8), 8, torch.ones(32), torch.ones(32), backend="triton")
            except RuntimeError as error:
                said.append(str(error))

    said = []
    launched()  # which plans it
    thread = threading.Thread(target=launched)
    thread.start()
    thread.join()
print(json.dumps([result, said]))
"""


@pytest.fixture(scope="module")
def launched() -> tuple[dict[str, list], list[str]]:
    """Launches by call, twice by plan and once by Triton; and errors of a thread that launches without a context."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _LAUNCHED], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_plans_launch_what_triton_launches(launched):
    """Grids, threads, shared memory, numbers and inputs of every launch, under a driver that writes them down: also of
    memory that is not aligned, and with steps of 64 bits."""
    calls, _ = launched
    assert len(calls) == 9
    for name, (first, again, by_triton) in calls.items():
        assert first == again == by_triton, name
        assert len(by_triton) >= (1 if "residual" in name else 2), name
    assert len(calls["group_norm_silu"][2]) == 4  # statistics and norm, sums and gradients
    numbers = [value for launch in calls["far norm"][0] for value in launch[4].values()]
    assert 2**31 + 16 in numbers


def test_a_thread_without_a_context_is_given_one(launched):
    """Such as autograd's, where the first kernel of a backward pass is one of these."""
    _, said = launched
    assert said == []
