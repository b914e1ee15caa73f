"""The engine's operators a forward: at most a quarter of EDM's own, on a GPU and on a CPU."""

import pytest
import torch

from benchmarks.dispatched import EDM, of_engine
from benchmarks.peak_memory import peak
from gdd_fast.backend import has_extension


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_quarter(name: str, device: str) -> None:
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    count = of_engine(name, device)
    assert 4 * count.total <= EDM[name][0], count.operators
    assert not any("cat" in operator for operator in count.operators), "a concatenation was built"


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1  # 1 beside x
        z = torch.cat([y, y])  # 3
        del y
        z = z.view(2, -1) * 2  # 4, and 2 once the first z is gone
        return z[:1].clone()  # 3

    assert peak(function, torch.zeros(1000)) == 4 * 4000
