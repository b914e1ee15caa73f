"""accelerate(net, engine="graph"): what is captured and replayed, what runs as it is, and why.

`Rehearsal` stands for CUDA graphs: it replays operator by operator on the memory of the recording, with everything else
poisoned.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import gdd_fast
from gdd_fast.acceleration.graphs import CALLS, Forwards, capture_forwards
from gdd_fast.engine.engines import MOST_DROPS
from gdd_fast.errors import BackendError, InputError
from rehearsal import Rehearsal

CPU = torch.device("cpu")


class Captured:
    """A `Capture` by a `Rehearsal` for each."""

    def __init__(self) -> None:
        self.number = self.drained = 0

    def drain(self) -> None:
        self.drained += 1

    def __call__(self, network, *inputs):
        recorder, spec = Rehearsal(warm_up=1), None
        static = [t.clone() for t in inputs]

        def step(*given):
            nonlocal spec
            leaves, spec = tree_flatten(network(*given))
            return {str(i): leaf for i, leaf in enumerate(leaves)}

        recorder.eagerly(step, static)
        replay = recorder.record(step, static)
        self.number += 1

        def again(*given):
            for own, new in zip(static, given, strict=True):
                own.copy_(new)
            return tree_unflatten(list(replay().values()), spec)

        return again


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x, time=1, *, scale=None):
        y = self.act(self.norm(self.conv(x))) * time
        return {"sample": y if scale is None else y * scale, "mean": y.mean()}


def captured() -> tuple[Net, Forwards]:
    torch.manual_seed(0)
    net = Net().eval()
    return net, capture_forwards(net, CPU, Captured())


def image(seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_replays_are_the_forward() -> None:
    net, forwards = captured()
    plain = gdd_fast.restore(copy.deepcopy(net))
    kept = []
    for seed in range(6):
        got, want = net(image(seed)), plain(image(seed))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        kept.append((got, want))
    torch.testing.assert_close([got for got, _ in kept], [want for _, want in kept], rtol=0, atol=0)
    assert forwards.replays == 6 - (CALLS - 1) and forwards.capture.number == 1
    assert "4 replays" in str(forwards) and "2 calls ran uncaptured: the first 2 calls of a kind" in str(forwards)


@torch.no_grad()
def test_kinds_of_calls_are_captured_for_themselves_and_changing_numbers_never() -> None:
    net, forwards = captured()
    plain = gdd_fast.restore(copy.deepcopy(net))
    scale = torch.tensor(3.0)
    calls = [((image(0),), {}), ((image(0, 6),), {}), ((image(0), 2), {}), ((image(0),), {"scale": scale})]
    for _ in range(CALLS + 1):
        for args, kwargs in calls:
            torch.testing.assert_close(net(*args, **kwargs), plain(*args, **kwargs), rtol=0, atol=0)
    assert forwards.capture.number == 4
    for number in range(100, 120):
        net(image(1), number)
    assert forwards.capture.number == 4
    torch.testing.assert_close(net(image(2), scale=scale * 2), plain(image(2), scale=scale * 2), rtol=0, atol=0)
    assert forwards.capture.number == 4, "a number in a tensor is an input"


@torch.no_grad()
@pytest.mark.usefixtures("switches")
def test_precisions_make_kinds_of_their_own_whichever_interface_sets_them() -> None:
    net, forwards = captured()
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    kinds = [
        (cudnn, "allow_tf32", True),
        (cudnn, "allow_tf32", False),
        (products, "fp32_precision", "tf32"),
        (cudnn.conv, "fp32_precision", "tf32"),
    ]
    for number, (switch, name, value) in enumerate(kinds, 1):
        setattr(switch, name, value)
        for seed in range(CALLS):
            net(image(seed))
        assert forwards.capture.number == number


@torch.no_grad()
def test_the_cache_is_bounded() -> None:
    net, forwards = captured()
    forwards.limit = 2
    for size in (4, 5, 6):
        for seed in range(CALLS):
            net(image(seed, size))
    assert len(forwards.graphs) == 2 and forwards.capture.number == 3 and forwards.capture.drained >= 1


@torch.no_grad()
def test_kinds_that_take_turns_beyond_the_limit_are_not_captured_for_ever() -> None:
    net, forwards = captured()
    forwards.limit = 2
    for seed in range(30):
        for size in (4, 5, 6):
            net(image(seed, size))
    assert forwards.captures == forwards.capture.number <= 3 * MOST_DROPS + 2
    assert len(forwards.graphs) == 2 and forwards.reasons["more than 2 kinds take turns"] > 15
    assert f"2 kinds of call kept, {forwards.captures} captures, {forwards.replays} replays" in str(forwards)


def test_what_a_replay_would_miss_runs_as_it_is() -> None:
    net, forwards = captured()

    def reason(call=lambda: net(image(1))) -> str:
        forwards.reasons.clear()
        replays = forwards.replays
        with torch.no_grad():
            call()
        assert forwards.replays == replays or not forwards.reasons
        return next(iter(forwards.reasons), "")

    for _ in range(CALLS):
        reason()
    assert reason() == ""
    handle = net.norm.register_forward_hook(lambda *_: None)
    assert reason() == "a hook is set on a GroupNorm"
    handle.remove()
    net.conv.train()
    assert reason() == "training mode"
    net.eval()
    net.conv.forward = lambda x: nn.Conv2d.forward(net.conv, x) + 1
    assert "replaced on the instance" in reason()
    del net.conv.forward
    assert reason() == ""
    net(image(1))
    assert forwards.reasons["gradients may be asked for"] == 1
    assert reason(lambda: net(image(1), scale=1j)) == "an argument of type complex"


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "data", "assigned", "loaded", "cast", "without weights"])
def test_weights_and_modules_that_change_are_seen(how: str) -> None:
    net, forwards = captured()
    for seed in range(CALLS + 1):
        net(image(seed))
    other = Net().eval()
    if how == "in place":
        for own, new in zip(net.parameters(), other.parameters(), strict=True):
            own.copy_(new)
    elif how == "data":
        net.conv.weight.data = other.conv.weight.clone()
    elif how == "assigned":
        net.norm = other.norm
    elif how == "loaded":
        net.load_state_dict(other.state_dict(), assign=True)
    elif how == "without weights":
        net.act = nn.ReLU().eval()
    else:
        net.double().float()
    plain = gdd_fast.restore(copy.deepcopy(net))
    for seed in range(CALLS + 1):
        torch.testing.assert_close(net(image(seed)), plain(image(seed)), rtol=0, atol=0)
    assert forwards.capture.number == (1 if how == "in place" else 2)
    if how != "in place":
        assert forwards.reasons["weights or modules have moved: will be captured anew"] == 1


@dataclass
class Hidden:
    sample: torch.Tensor


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: {"sample": Hidden(y)}, "returns a Hidden"),
        (lambda y: {"sample": y * float(y.sum())}, "waits for the device"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_so(change, reason) -> None:
    class Odd(Net):
        def forward(self, x):
            return change(super().forward(x)["sample"])

    net = Odd().eval()
    forwards = capture_forwards(net, CPU, Captured())
    for seed in range(CALLS + 2):
        net(image(seed))
    assert forwards.replays == 0
    assert any(reason in why and count == 3 for why, count in forwards.reasons.items()), forwards.reasons


def test_restoring_copying_and_where_it_cannot_be() -> None:
    net, forwards = captured()
    twin = copy.deepcopy(net)
    assert twin._gdd_graphs is not forwards and not twin._gdd_graphs.graphs
    assert type(gdd_fast.restore(net)) is Net and "_gdd_graphs" not in vars(net)
    with pytest.raises(BackendError, match="cannot run on cpu"):
        gdd_fast.accelerate(net, engine="graph")
    with pytest.raises(BackendError, match="unknown engine"):
        gdd_fast.accelerate(net, engine="fast")
    net.forward = net.forward
    with pytest.raises(InputError, match="replaced on the instance"):
        capture_forwards(net, CPU, Captured())


@torch.no_grad()
def test_over_a_network_that_is_a_replaced_layer_itself() -> None:
    """The class is exchanged twice, and given back twice."""
    net = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    want = net(image(0, 8))
    net, report = gdd_fast.accelerate(net, backend="torch", report=True)
    assert any(entry.path == "" for entry in report.replaced)
    capture_forwards(net, CPU, Captured())
    for _ in range(CALLS + 1):
        torch.testing.assert_close(net(image(0, 8)), want)
    assert net._gdd_graphs.replays == 2
    assert type(report.undo()) is nn.Conv2d and not {"_gdd_fast", "_gdd_graphs"} & set(vars(net))
