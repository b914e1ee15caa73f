"""A recorded network: the same results without Python, for every kind of call, and as it is where somebody watches."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

from gdd_fast.backend import has_extension
from gdd_fast.engine.recorded import Recorded
from gdd_fast.errors import ConfigError

pytestmark = pytest.mark.skipif(not has_extension(), reason="the extension is not built")


class Network(nn.Module):
    """Views, lists of results, writing in place, constants, and a memory format; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.calls = 0

    def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
        self.calls += 1
        x = self.conv(latents.to(memory_format=torch.channels_last))
        x.narrow(1, 0, 2).add_(x.split(2, 1)[1], alpha=0.5)
        return x if rows is None else x * rows[:, :4, None, None]


def both(images: Tensor) -> tuple[Tensor, Tensor]:
    return images * 2, images.isfinite().all()


def expected(network: Network, latents: Tensor, rows: Tensor | None) -> Tensor:
    before = network.calls
    y = network(latents, rows)
    network.calls = before
    return y


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_from_the_third_call_of_a_kind_on_nothing_runs_in_python() -> None:
    network = Network()
    recorded = Recorded(network)
    for rows in (None, torch.randn(3, 5)):
        for n in (1, 3) if rows is None else (3,):
            before = network.calls
            for call in range(5):
                z = torch.randn(n, 2, 5, 5)
                assert torch.equal(recorded(z, rows), expected(network, z, rows))
                assert network.calls - before == min(call + 1, 2)
    z = torch.randn(3, 2, 5, 5)
    for _ in range(4):
        doubled, finite = recorded(z, None, both)
        assert torch.equal(doubled, 2 * expected(network, z, None)) and finite
    assert not recorded(z / 0, None, both)[1]
    other = z.contiguous(memory_format=torch.channels_last)
    assert torch.equal(recorded(other, None), expected(network, other, None))


def test_results_are_the_callers_and_inputs_are_left() -> None:
    recorded, z = Recorded(Network()), torch.randn(1, 2, 4, 4)
    kept = z.clone()
    results = [recorded(z, None) for _ in range(4)]
    results[2].zero_()
    assert torch.equal(results[3], results[0]) and torch.equal(recorded(z, None), results[0])
    assert torch.equal(z, kept)


def test_weights_that_change_in_place_are_read_anew() -> None:
    network = Network()
    recorded, z = Recorded(network), torch.randn(1, 2, 4, 4)
    for _ in range(3):
        recorded(z, None)
    network.conv.weight.mul_(2)
    assert torch.equal(recorded(z, None), expected(network, z, None))


def test_hooks_dispatch_modes_and_gradients_have_the_network_run_as_it_is() -> None:
    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watching.seen += 1
            return func(*args, **(kwargs or {}))

    network = Network()
    recorded, z = Recorded(network), torch.randn(1, 2, 4, 4)
    for _ in range(3):
        recorded(z, None)
    assert network.calls == 2
    with Watching():
        recorded(z, None)
    assert network.calls == 3 and Watching.seen > 3
    with torch.enable_grad():
        assert recorded(z, None).requires_grad
    handle = network.conv.register_forward_hook(lambda _m, _x, y: y + 1)
    assert torch.equal(recorded(z, None), expected(network, z, None))
    handle.remove()
    before = network.calls
    assert torch.equal(recorded(z, None), expected(network, z, None))
    assert network.calls == before


def test_what_cannot_be_repeated_runs_as_it_is() -> None:
    class Branch(nn.Module):
        def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
            return latents + 1 if latents.sum().item() > 0 else latents - 1

    class Listed(nn.Module):
        def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
            return torch.cat([latents, latents], 1)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = nn.Buffer(torch.ones(2))

        def forward(self, latents: Tensor, rows: Tensor | None) -> Tensor:
            return self.kept

    one = torch.ones(1, 2, 3, 3)
    for network in (Branch(), Listed(), Constant()):
        recorded = Recorded(network)
        for z in (one, one, one, -one):
            assert torch.equal(recorded(z, None), network(z, None))


def test_the_kind_used_least_recently_goes_first() -> None:
    network = Network()
    recorded = Recorded(network, limit=2)
    a, b, c = (torch.randn(n, 2, 4, 4) for n in (1, 2, 3))
    for z in (a, a, b, b, a, c):  # c takes the place of b
        recorded(z, None)
    before = network.calls
    recorded(a, None)
    assert network.calls == before
    recorded(b, None)
    assert network.calls == before + 1
    with pytest.raises(ConfigError, match="at least 1"):
        Recorded(network, limit=0)


def test_threads_do_not_disturb_each_other() -> None:
    network = Network()
    recorded = Recorded(network)
    inputs = [torch.full((1 + i % 2, 2, 6, 6), float(i)) for i in range(40)]
    wanted = [network(z, None) for z in inputs]

    def run(z: Tensor) -> Tensor:
        with torch.no_grad():
            return recorded(z, None)

    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(run, inputs), wanted, strict=True):
            assert torch.equal(found, want)
    assert not is_in_torch_dispatch_mode()  # or every operator would take its slower way from now on
